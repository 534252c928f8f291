// The extension module: kernels by name, and how to launch one. It knows pointers, sizes and a stream; no tensor.
//
//     kernels()                                                             what each takes, by name: see entry.h
//     launch(name, device, grid, threads, shared, stream, arguments)        raises KeyError, ValueError, RuntimeError
//
// `arguments` holds each argument in eight bytes, a smaller one in the first of them.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "entry.h"

namespace py = pybind11;

namespace {

constexpr std::size_t SLOT = 8;
constexpr int ORDINARY_SHARED = 48 << 10;  // a kernel has to ask for more

struct Known {
    Kernel kernel;
    std::vector<int> allowed;  // bytes of shared memory, on each device that was asked for more; guarded by the GIL
};

std::unordered_map<std::string, Known>& table() {
    static auto found = [] {
        std::unordered_map<std::string, Known> made;
        for (const Kernel& kernel : all_kernels()) made.emplace(kernel.name, Known{kernel, {}});
        return made;
    }();
    return found;
}

void check(cudaError_t error, const std::string& name) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next call of anybody would report it once more
    throw std::runtime_error(name + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

std::unordered_map<std::string, std::string> kernels() {
    std::unordered_map<std::string, std::string> found;
    for (const auto& [name, known] : table()) found.emplace(name, known.kernel.arguments);
    return found;
}

// Asks once for as much shared memory as any launch of a kernel takes: a later question for less would count.
void allow(Known& known, int device, int shared) {
    if (std::size_t(device) >= known.allowed.size()) known.allowed.resize(device + 1, ORDINARY_SHARED);
    if (shared <= known.allowed[device]) return;
    check(cudaFuncSetAttribute(known.kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          known.kernel.name);
    known.allowed[device] = shared;
}

void launch(const std::string& name, int device, std::array<unsigned, 3> grid, unsigned threads, int shared,
            std::uintptr_t stream, const py::bytes& arguments) {
    const auto found = table().find(name);
    if (found == table().end()) throw py::key_error(name);
    const Kernel& kernel = found->second.kernel;
    const std::string_view given = arguments;
    const std::size_t count = kernel.arguments.size();
    if (given.size() != count * SLOT)
        throw py::value_error(name + " takes " + std::to_string(count) + " arguments of " +
                              std::to_string(SLOT) + " bytes, got " + std::to_string(given.size()) + " bytes");
    alignas(SLOT) char slots[64 * SLOT];
    void* places[64];
    if (count > 64) throw py::value_error(name + " takes more than 64 arguments");
    given.copy(slots, given.size());
    for (std::size_t i = 0; i < count; ++i) places[i] = slots + i * SLOT;

    check(cudaSetDevice(device), name);
    allow(found->second, device, shared);
    check(cudaLaunchKernel(kernel.function, dim3(grid[0], grid[1], grid[2]), dim3(threads), places, shared,
                           reinterpret_cast<cudaStream_t>(stream)),
          name);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "The CUDA C++ kernels that were compiled when the package was built.";
    module.def("kernels", &kernels);
    module.def("launch", &launch, py::arg("name"), py::arg("device"), py::arg("grid"), py::arg("threads"),
               py::arg("shared"), py::arg("stream"), py::arg("arguments"));
}
