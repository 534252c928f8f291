// One block after the other, one fiber for each of its threads. A warp runs until all of its lanes stand at the same
// warp-wide operation, which then happens for the 32 of them, or at the block's barrier. The seed says which warp is next.
//
// What is an error: an access outside a buffer or misaligned, a write to an input, a read of what was never written or
// of what an asynchronous copy has not delivered, lanes or warps that part at an operation, and a race: an access to
// shared memory that another thread has written, or a write to what it has read, with no barrier between; in global
// memory, a read or a write of what another thread of the launch has written.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "fiber.h"

namespace {

constexpr int LANES = 32;
constexpr int GRANULE = 2;  // bytes of shared memory that are watched as one: the smallest element
constexpr size_t STACK = 256 << 10;
constexpr uint16_t NOBODY = 0xffff, SEVERAL = 0xfffe, LANES_OF = 0x8000;  // readers: one, lanes of one warp, more

enum class State { READY, AT_WARP, AT_BLOCK, DONE };

struct Copy {
    unsigned address;
    const char* source;  // null: zeros
};

struct Thread {
    Context context;
    State state;
    const char* operation;
    void (*perform)(void* const*);
    void* operands;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first; the last is open
};

struct Granule {
    uint16_t writer = NOBODY, reader = NOBODY;
    bool written = false, pending = false;
    uint32_t written_at = 0, written_warp_at = 0, read_at = 0, read_warp_at = 0;
};

struct Buffer {
    char* base;
    int64_t size;
    int writable;
    const char* name;
};

struct Watched : Buffer {
    std::vector<uint32_t> writers;  // by pair of bytes: thread of the launch + 1
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

const Launch* launch;
std::vector<Watched> buffers;
std::vector<Thread> threads;
std::vector<uint32_t> warp_syncs;  // of each warp
std::vector<unsigned char> shared;
std::vector<Granule> granules;
char* stacks;
size_t stack_count;
Context scheduler;
int block[3];
int current;  // thread
uint32_t block_syncs;
char message[1024];
bool failed;

[[noreturn]] void fail(const char* format, ...) {
    int used = snprintf(message, sizeof message, "%s, block (%d, %d, %d), thread %d: ", launch->kernel, block[0],
                        block[1], block[2], current);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message + used, sizeof message - used, format, arguments);
    va_end(arguments);
    failed = true;
    Context nowhere;
    switch_context(nowhere, scheduler);
    abort();
}

void leave(State state) {
    threads[current].state = state;
    Thread& me = threads[current];
    switch_context(me.context, scheduler);
}

// All 32 lanes bring their operands to one operation.
void gather(const char* operation, void (*perform)(void* const*), void* operands) {
    Thread& me = threads[current];
    me.operation = operation;
    me.perform = perform;
    me.operands = operands;
    leave(State::AT_WARP);
}

void thread_body() {
    launch->entry(launch->arguments);
    for (const auto& group : threads[current].groups)
        if (!group.empty()) fail("ends with %zu asynchronous copies on their way", group.size());
    leave(State::DONE);
    abort();
}

bool same_warp(int a, int b) { return a / LANES == b / LANES; }

void check_shared(unsigned address, unsigned bytes, const char* what) {
    if (address % bytes) fail("%s of %u bytes at shared address %u: misaligned", what, bytes, address);
    if (size_t(address) + bytes > shared.size())
        fail("%s of %u bytes at shared address %u: there are %zu bytes", what, bytes, address, shared.size());
}

// Whether what `other` did at these counts of barriers is ordered before what the current thread does now.
bool ordered(int other, uint32_t at, uint32_t warp_at) {
    return other == current || at != block_syncs ||
           (same_warp(other, current) && warp_at != warp_syncs[current / LANES]);
}

void note_read(unsigned address, unsigned bytes) {
    check_shared(address, bytes, "read");
    for (unsigned i = address / GRANULE; i < (address + bytes) / GRANULE; ++i) {
        Granule& g = granules[i];
        if (g.pending)
            fail("reads shared address %u, where an asynchronous copy of thread %d has not arrived", i * GRANULE,
                 g.writer);
        if (!g.written) fail("reads shared address %u, which was never written", i * GRANULE);
        if (!ordered(g.writer, g.written_at, g.written_warp_at))
            fail("reads shared address %u, which thread %d wrote, without a barrier between", i * GRANULE, g.writer);
        uint32_t warp_at = warp_syncs[current / LANES];
        uint16_t lanes = LANES_OF | current / LANES;
        if (g.reader == NOBODY || g.read_at != block_syncs) {
            g.reader = current;
        } else if (g.reader != current) {
            bool ours = g.reader == lanes || (g.reader < LANES_OF && same_warp(g.reader, current));
            g.reader = !ours ? SEVERAL : (g.read_warp_at == warp_at ? lanes : current);
        }
        g.read_at = block_syncs;
        g.read_warp_at = warp_at;
    }
}

void note_write(unsigned address, unsigned bytes, bool pending) {
    check_shared(address, bytes, pending ? "asynchronous copy" : "write");
    for (unsigned i = address / GRANULE; i < (address + bytes) / GRANULE; ++i) {
        Granule& g = granules[i];
        if (g.pending) fail("writes shared address %u, where an asynchronous copy has not arrived", i * GRANULE);
        if (g.written && !ordered(g.writer, g.written_at, g.written_warp_at))
            fail("writes shared address %u, as thread %d did, without a barrier between", i * GRANULE, g.writer);
        if (g.reader != NOBODY && g.read_at == block_syncs) {
            bool several = g.reader == SEVERAL;
            bool lanes = !several && g.reader >= LANES_OF;
            int reader = lanes ? (g.reader & ~LANES_OF) * LANES + (current % LANES == 0) : g.reader;
            if (several || !ordered(reader, g.read_at, g.read_warp_at))
                fail("writes shared address %u, which another thread read, without a barrier between", i * GRANULE);
        }
        g.pending = pending;
        g.written = true;
        g.writer = current;
        g.written_at = block_syncs;
        g.written_warp_at = warp_syncs[current / LANES];
        g.reader = NOBODY;
    }
}

void arrive(const std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        if (copy.source) {
            memcpy(&shared[copy.address], copy.source, 16);
        } else {
            memset(&shared[copy.address], 0, 16);
        }
        for (unsigned i = copy.address / GRANULE; i < (copy.address + 16) / GRANULE; ++i) {
            granules[i].pending = false;
            granules[i].written_at = block_syncs;
            granules[i].written_warp_at = warp_syncs[current / LANES];
        }
    }
}

Watched& find(const void* pointer, unsigned bytes, const char* what) {
    auto at = static_cast<const char*>(pointer);
    if (reinterpret_cast<uintptr_t>(at) % bytes) fail("%s of %u bytes at %p: misaligned", what, bytes, pointer);
    for (Watched& one : buffers)
        if (at >= one.base && at + bytes <= one.base + one.size) return one;
    const Watched* nearest = nullptr;
    auto distance = [&](const Watched& one) { return at < one.base ? one.base - at : at - one.base - one.size; };
    for (const Watched& one : buffers)
        if (!nearest || distance(one) < distance(*nearest)) nearest = &one;
    if (nearest)
        fail("%s of %u bytes at offset %td of %s, which has %lld", what, bytes, at - nearest->base, nearest->name,
             static_cast<long long>(nearest->size));
    fail("%s of %u bytes at %p: there is no buffer", what, bytes, pointer);
}

uint32_t identity() {
    return ((uint32_t(block[2]) * launch->grid[1] + block[1]) * launch->grid[0] + block[0]) * launch->threads +
           current + 1;
}

void check_global_read(const void* pointer, unsigned bytes, const char* what) {
    Watched& buffer = find(pointer, bytes, what);
    if (!buffer.writable) return;
    size_t first = (static_cast<const char*>(pointer) - buffer.base) / 2;
    for (size_t i = first; i < first + bytes / 2; ++i)
        if (buffer.writers[i] && buffer.writers[i] != identity())
            fail("reads offset %zu of %s, which another thread of the launch wrote", 2 * i, buffer.name);
}

float to_float(uint16_t bits, bool bfloat16) {
    if (bfloat16) {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }
    static const std::vector<float> table = [] {
        std::vector<float> found(1 << 16);
        for (int i = 0; i < 1 << 16; ++i) {
            int exponent = i >> 10 & 31, fraction = i & 1023;
            float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                              : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                             : std::ldexp(float(fraction), -24);
            found[i] = i >> 15 ? -magnitude : magnitude;
        }
        return found;
    }();
    return table[bits];
}

uint16_t from_float(float value, bool bfloat16) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (bfloat16) {
        if (std::isnan(value)) return 0x7fff;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    uint16_t sign = bits >> 16 & 0x8000;
    if (std::isnan(value)) return 0x7fff;
    float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < std::ldexp(1.0f, -14)) return sign | uint16_t(std::nearbyint(std::ldexp(magnitude, 24)));
    int exponent;
    std::frexp(magnitude, &exponent);  // magnitude = fraction * 2^exponent, fraction in [1/2, 1)
    uint32_t fraction = uint32_t(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));  // 1024 to 2048
    return sign | uint16_t(((exponent + 13) << 10) + fraction);
}

struct Matrices {
    unsigned* registers;
    unsigned address;
    int count;
    bool transposed;
};

void perform_load_matrices(void* const* lanes) {
    auto lane = [&](int i) -> const Matrices& { return *static_cast<Matrices*>(lanes[i]); };
    int first = current - current % LANES;
    for (int m = 0; m < lane(0).count; ++m) {
        uint16_t matrix[8][8];
        for (int row = 0; row < 8; ++row) {
            current = first + 8 * m + row;
            unsigned address = lane(8 * m + row).address;
            note_read(address, 16);
            memcpy(matrix[row], &shared[address], 16);
        }
        for (int l = 0; l < LANES; ++l) {
            int row = l / 4, column = 2 * (l % 4);
            uint16_t low = lane(0).transposed ? matrix[column][row] : matrix[row][column];
            uint16_t high = lane(0).transposed ? matrix[column + 1][row] : matrix[row][column + 1];
            lane(l).registers[m] = low | uint32_t(high) << 16;
        }
    }
}

struct Product {
    float* c;
    const unsigned *a, *b;
    int depth;
    bool bfloat16;
};

void perform_mma(void* const* lanes) {
    auto lane = [&](int i) -> const Product& { return *static_cast<Product*>(lanes[i]); };
    bool bfloat16 = lane(0).bfloat16;
    int depth = lane(0).depth;
    float a[16][16], b[16][8], c[16][8];
    auto unpack = [&](unsigned pair, float& low, float& high) {
        low = to_float(pair & 0xffff, bfloat16);
        high = to_float(pair >> 16, bfloat16);
    };
    for (int l = 0; l < LANES; ++l) {
        int row = l / 4, column = 2 * (l % 4);
        for (int half = 0; half < depth / 8; ++half) {
            for (int down = 0; down < 2; ++down)
                unpack(lane(l).a[2 * half + down], a[row + 8 * down][column + 8 * half], a[row + 8 * down][column + 8 * half + 1]);
            unpack(lane(l).b[half], b[column + 8 * half][row], b[column + 8 * half + 1][row]);
        }
        for (int i = 0; i < 4; ++i) c[row + 8 * (i / 2)][column + i % 2] = lane(l).c[i];
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < depth; ++k)
            for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < LANES; ++l)
        for (int i = 0; i < 4; ++i) lane(l).c[i] = c[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
}

struct Shuffle {
    float value;
    int mask;
    float result;
};

void perform_shuffle(void* const* lanes) {
    for (int l = 0; l < LANES; ++l) {
        auto mine = static_cast<Shuffle*>(lanes[l]);
        if (mine->mask != static_cast<Shuffle*>(lanes[0])->mask || mine->mask < 0 || mine->mask >= LANES)
            fail("shuffles with the mask %d", mine->mask);
        mine->result = static_cast<Shuffle*>(lanes[l ^ mine->mask])->value;
    }
}

void perform_sync_warp(void* const*) { ++warp_syncs[current / LANES]; }

// Runs a warp's ready lanes to their next operation; true if the warp can go on.
bool run_warp(int warp, bool backward) {
    for (int i = 0; i < LANES; ++i) {
        current = warp * LANES + (backward ? LANES - 1 - i : i);
        if (threads[current].state != State::READY) continue;
        switch_context(scheduler, threads[current].context);
        if (failed) return false;
    }
    Thread* lane = &threads[warp * LANES];
    for (int i = 1; i < LANES; ++i) {
        bool same = lane[i].state == lane[0].state;
        if (same && lane[0].state == State::AT_WARP)
            same = lane[i].perform == lane[0].perform && !strcmp(lane[i].operation, lane[0].operation);
        if (!same) {
            auto name = [](const Thread& t) {
                return t.state == State::AT_BLOCK ? "the block's barrier" : t.state == State::DONE ? "the end" : t.operation;
            };
            current = warp * LANES + i;
            snprintf(message, sizeof message, "%s, block (%d, %d, %d), warp %d: lane 0 is at %s, lane %d at %s",
                     launch->kernel, block[0], block[1], block[2], warp, name(lane[0]), i, name(lane[i]));
            failed = true;
            return false;
        }
    }
    return lane[0].state == State::AT_WARP;
}

void operate(int warp) {
    void* operands[LANES];
    Thread* lane = &threads[warp * LANES];
    for (int i = 0; i < LANES; ++i) operands[i] = lane[i].operands;
    current = warp * LANES;
    lane[0].perform(operands);
    for (int i = 0; i < LANES; ++i) lane[i].state = State::READY;
}

// The operations of lanes fail in a context of their own: there is one more fiber for them.
Context operator_context;
int operating_warp;

void operator_body() {
    for (;;) {
        operate(operating_warp);
        switch_context(operator_context, scheduler);
    }
}

void run_block(std::mt19937& random) {
    int warps = launch->threads / LANES, waiting = 0, done = 0;
    shared.assign(launch->shared, 0xff);
    granules.assign((launch->shared + GRANULE - 1) / GRANULE, Granule{});
    block_syncs = 0;
    warp_syncs.assign(warps, 0);
    std::vector<char> runnable(warps, 1);
    for (int t = 0; t < launch->threads; ++t) {
        threads[t].state = State::READY;
        threads[t].groups.assign(1, {});
        threads[t].context.start(stacks + t * STACK, STACK, thread_body);
    }
    operator_context.start(stacks + launch->threads * STACK, STACK, operator_body);
    while (done < warps) {
        std::vector<int> ready;
        for (int w = 0; w < warps; ++w)
            if (runnable[w]) ready.push_back(w);
        if (ready.empty()) {
            if (done) {
                current = 0;
                snprintf(message, sizeof message, "%s, block (%d, %d, %d): some warps ended, %d wait at the barrier",
                         launch->kernel, block[0], block[1], block[2], waiting);
                failed = true;
                return;
            }
            ++block_syncs;
            waiting = 0;
            for (auto& thread : threads) thread.state = State::READY;
            runnable.assign(warps, 1);
            continue;
        }
        int warp = launch->seed == 0   ? ready.front()
                   : launch->seed == 1 ? ready.back()
                                       : ready[random() % ready.size()];
        bool more = run_warp(warp, launch->seed == 1);
        if (failed) return;
        if (more) {
            operating_warp = warp;
            switch_context(scheduler, operator_context);
            if (failed) return;
        } else {
            runnable[warp] = 0;
            if (threads[warp * LANES].state == State::DONE) {
                ++done;
            } else {
                ++waiting;
            }
        }
    }
}

}  // namespace

namespace simulator {

int thread_x() { return current; }
int block_x() { return block[0]; }
int block_y() { return block[1]; }
int grid_x() { return launch->grid[0]; }

void sync_block() { leave(State::AT_BLOCK); }
void sync_warp() { gather("sync_warp", perform_sync_warp, nullptr); }

float shuffle_xor(float value, int mask) {
    Shuffle mine{value, mask, 0};
    gather("shuffle_xor", perform_shuffle, &mine);
    return mine.result;
}

void shared_read(unsigned address, void* value, unsigned bytes) {
    note_read(address, bytes);
    memcpy(value, &shared[address], bytes);
}

void shared_write(unsigned address, const void* value, unsigned bytes) {
    note_write(address, bytes, false);
    memcpy(&shared[address], value, bytes);
}

void global_read(const void* pointer, void* value, unsigned bytes) {
    check_global_read(pointer, bytes, "read");
    memcpy(value, pointer, bytes);
}

void global_write(void* pointer, const void* value, unsigned bytes) {
    Watched& buffer = find(pointer, bytes, "write");
    if (!buffer.writable) fail("writes to %s", buffer.name);
    size_t first = (static_cast<char*>(pointer) - buffer.base) / 2;
    for (size_t i = first; i < first + bytes / 2; ++i) {
        if (buffer.writers[i] && buffer.writers[i] != identity())
            fail("writes offset %zu of %s, as another thread of the launch did", 2 * i, buffer.name);
        buffer.writers[i] = identity();
    }
    memcpy(pointer, value, bytes);
}

void copy_async(unsigned address, const void* pointer, bool valid) {
    if (valid) check_global_read(pointer, 16, "asynchronous copy");
    note_write(address, 16, true);
    memset(&shared[address], 0xff, 16);
    threads[current].groups.back().push_back({address, valid ? static_cast<const char*>(pointer) : nullptr});
}

void commit_copies() { threads[current].groups.emplace_back(); }

void wait_copies(unsigned count) {
    auto& groups = threads[current].groups;
    while (groups.size() > count + 1) {
        arrive(groups.front());
        groups.erase(groups.begin());
    }
}

void load_matrices(unsigned* registers, unsigned address, int count, bool transposed) {
    Matrices mine{registers, address, count, transposed};
    static const char* const names[2][5] = {
        {"", "load_matrices<1>", "load_matrices<2>", "", "load_matrices<4>"},
        {"", "load_matrices_transposed<1>", "load_matrices_transposed<2>", "", "load_matrices_transposed<4>"}};
    gather(names[transposed][count], perform_load_matrices, &mine);
}

void mma(float* c, const unsigned* a, const unsigned* b, int depth, bool bfloat16) {
    Product mine{c, a, b, depth, bfloat16};
    gather(depth == 16 ? "mma_k16" : "mma_k8", perform_mma, &mine);
}

unsigned narrow(float low, float high, bool bfloat16) {
    return from_float(low, bfloat16) | unsigned(from_float(high, bfloat16)) << 16;
}

void widen(unsigned pair, float* low, float* high, bool bfloat16) {
    *low = to_float(pair & 0xffff, bfloat16);
    *high = to_float(pair >> 16, bfloat16);
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

}  // namespace simulator

// Runs a launch; null, or what went wrong.
extern "C" const char* simulator_run(const Launch* given) {
    launch = given;
    failed = false;
    buffers.clear();
    for (int i = 0; i < given->buffer_count; ++i) {
        buffers.push_back({given->buffers[i], {}});
        if (given->buffers[i].writable) buffers.back().writers.assign((given->buffers[i].size + 1) / 2, 0);
    }
    threads.assign(given->threads, Thread{});
    if (stack_count < size_t(given->threads) + 1) {
        if (stacks) munmap(stacks, stack_count * STACK);
        stack_count = given->threads + 1;
        stacks = new_stacks(stack_count * STACK);
    }
    std::mt19937 random(given->seed);
    for (block[2] = 0; block[2] < given->grid[2]; ++block[2])
        for (block[1] = 0; block[1] < given->grid[1]; ++block[1])
            for (block[0] = 0; block[0] < given->grid[0]; ++block[0]) {
                run_block(random);
                if (failed) return message;
            }
    return nullptr;
}
