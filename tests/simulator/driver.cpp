// The calls of the CUDA driver that the package makes, on a CPU: machine code is the path of a kernel that was built for
// the simulator, and a launch runs it before it returns. Memory is what watch() names for the next launches of a thread.
//
// As the driver does, a launch reads every argument by the size that the kernel says and refuses a context that is not
// the function's, more dynamic shared memory than was asked for, and more than a block may have.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

namespace {

enum Code {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
};

struct Buffer {
    char* base;
    int64_t size;
    int writable;
    const char* name;
};

struct Launch {
    void (*entry)(void**);
    void** arguments;
    int grid[3];
    int threads;
    int shared;
    int seed;
    const Buffer* buffers;
    int buffer_count;
    const char* kernel;
};

struct Device {
    int index;
};

struct Module {
    void* library;
    Device* context;
    std::string path;
};

struct Function {
    Module* module;
    std::string name;
    int allowed = 48 << 10;
};

Device devices[2] = {{0}, {1}};
thread_local Device* context;
thread_local std::vector<Buffer> watched;
thread_local std::deque<std::string> names;  // of what is watched
thread_local std::string words;
std::mutex running;
int largest = 0;
std::string refused;  // the call that fails next, and its code
int code_of_refused;
std::vector<std::string> calls;
std::mutex noting;

int note(const std::string& call) {
    words.clear();
    std::lock_guard<std::mutex> lock(noting);
    calls.push_back(call);
    if (call.substr(0, call.find(' ')) != refused) return SUCCESS;
    refused.clear();
    return code_of_refused;
}

template <class F>
F symbol(void* library, const char* name) {
    return reinterpret_cast<F>(dlsym(library, name));
}

}  // namespace

extern "C" {

// For tests: a machine with so much shared memory for a block; the memory of the next launches; the device of this thread's
// context; an error of the next call of a name; and the calls so far, one in a line.
void stand_in_reset(int shared) {
    largest = shared;
    context = nullptr;
    refused.clear();
    calls.clear();
}

void stand_in_watch(const Buffer* buffers, int count) {
    watched.assign(buffers, buffers + count);
    names.clear();
    for (Buffer& buffer : watched) buffer.name = names.emplace_back(buffer.name).c_str();
}

int stand_in_device() { return context ? context->index : -1; }

void stand_in_refuse(const char* call, int code) {
    refused = call;
    code_of_refused = code;
}

const char* stand_in_calls() {
    static std::string text;
    text.clear();
    for (const auto& call : calls) text += call + "\n";
    return text.c_str();
}

int cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

int cuGetErrorName(int code, const char** name) {
    switch (code) {
        case INVALID_VALUE: return *name = "CUDA_ERROR_INVALID_VALUE", SUCCESS;
        case OUT_OF_MEMORY: return *name = "CUDA_ERROR_OUT_OF_MEMORY", SUCCESS;
        case INVALID_DEVICE: return *name = "CUDA_ERROR_INVALID_DEVICE", SUCCESS;
        case INVALID_IMAGE: return *name = "CUDA_ERROR_INVALID_IMAGE", SUCCESS;
        case INVALID_CONTEXT: return *name = "CUDA_ERROR_INVALID_CONTEXT", SUCCESS;
        case NOT_FOUND: return *name = "CUDA_ERROR_NOT_FOUND", SUCCESS;
        case ILLEGAL_ADDRESS: return *name = "CUDA_ERROR_ILLEGAL_ADDRESS", SUCCESS;
        case LAUNCH_FAILED: return *name = "CUDA_ERROR_LAUNCH_FAILED", SUCCESS;
    }
    return *name = nullptr, INVALID_VALUE;
}

int cuGetErrorString(int code, const char** text) {
    if (cuGetErrorName(code, text)) return INVALID_VALUE;
    *text = words.empty() ? "in the stand-in's words" : words.c_str();
    return SUCCESS;
}

int cuDeviceGet(int* device, int index) {
    if (index < 0 || index > 1) return INVALID_DEVICE;
    *device = index;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** found, int device) {
    *found = &devices[device];
    return note("cuDevicePrimaryCtxRetain " + std::to_string(device));
}

int cuCtxSetCurrent(void* given) {
    context = static_cast<Device*>(given);
    return SUCCESS;
}

int cuModuleLoadData(void** module, const void* image) {
    if (int code = note("cuModuleLoadData")) return code;
    if (!context) return INVALID_CONTEXT;
    auto path = static_cast<const char*>(image);
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return words = dlerror(), INVALID_IMAGE;
    *module = new Module{library, context, path};
    return SUCCESS;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    auto from = static_cast<Module*>(module);
    if (!dlsym(from->library, "simulated_kernel")) return NOT_FOUND;
    *function = new Function{from, name};
    return note("cuModuleGetFunction");
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (int code = note("cuFuncSetAttribute " + std::to_string(value))) return code;
    if (attribute != 8 || value > largest) return INVALID_VALUE;
    static_cast<Function*>(function)->allowed = value;
    return SUCCESS;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void* stream, void** arguments, void** extra) {
    auto f = static_cast<Function*>(function);
    auto at = std::to_string(reinterpret_cast<uintptr_t>(stream));
    if (int code = note("cuLaunchKernel " + std::to_string(f->module->context->index) + " " + at + " " + f->name))
        return code;
    if (context != f->module->context) return INVALID_CONTEXT;
    if (threads > 1024 || threads_y != 1 || threads_z != 1 || extra || int(shared) > f->allowed) return INVALID_VALUE;
    std::lock_guard<std::mutex> lock(running);  // before arguments are read: who shares them finds those of others
    int sizes[64];
    int count = symbol<int (*)(int*)>(f->module->library, "simulated_sizes")(sizes);
    std::vector<uint64_t> values(count);
    std::vector<void*> places(count);
    for (int i = 0; i < count; ++i) places[i] = memcpy(&values[i], arguments[i], sizes[i]);
    Launch launch{symbol<void (*)(void**)>(f->module->library, "simulated_kernel"), places.data(),
                  {int(x), int(y), int(z)}, int(threads), int(shared), 2, watched.data(), int(watched.size()),
                  f->name.c_str()};
    if (auto message = symbol<const char* (*)(const Launch*)>(f->module->library, "simulator_run")(&launch))
        return words = message, LAUNCH_FAILED;
    return SUCCESS;
}

}  // extern "C"
