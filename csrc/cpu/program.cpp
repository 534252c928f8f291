// Networks in evaluation on a CPU: a program of steps over maps in channels_last, run in one parallel region.
//
// The work of a step is cut into chunks, each thread has a range of them and takes from the others when its own is
// done. A step begins when all chunks of the one before are done, whoever did them, so that a thread that the system
// put aside holds up nothing but a chunk that it has begun. No result depends on the number of threads.
//
// Maps are float32 or bfloat16, sums are float32. Compiled and loaded by regnet_fast/backends/cpu_library.py, and
// called by regnet_fast/backends/native.py.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include <omp.h>
#include <pthread.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "depthwise.h"
#include "matrix.h"
#include "pace.h"
#include "winograd.h"

namespace {

constexpr int64_t MAP_CHUNK = 1 << 14;  // numbers of a map in a chunk
constexpr int64_t AVERAGED = 8 * LANES;  // channels in a chunk
constexpr int SPINS = 20000;

/// y[n][c] = the sum over bands of x[n][band][c], divided by the number of pixels.
void means_chunk(const Step& s, void* const* buffers, int64_t image) {
    const float* x = static_cast<const float*>(buffers[s.x]) + image * s.height * s.channels;
    float* y = static_cast<float*>(buffers[s.y]) + image * s.channels;
    for (int64_t c = 0; c < s.channels; c += LANES) {
        const int count = int(std::min<int64_t>(LANES, s.channels - c));
        Vec total = {};
        for (int64_t b = 0; b < s.height; b++) total += load(x + b * s.channels + c, count);
        store(y + c, total * (1.0f / float(s.width)), count);
    }
}

/// y = activation(x * gate * scale + shift + residual).
template <typename T>
void affine_chunk(const Step& s, void* const* buffers, int64_t chunk, int64_t bands, int64_t band) {
    const int64_t image = chunk / bands, first = chunk % bands * band, pixels = s.height * s.width;
    const float* gate = s.gate < 0 ? nullptr : static_cast<const float*>(buffers[s.gate]) + image * s.channels;
    const int64_t end = std::min(first + band, pixels);
    for (int64_t p = first; p < end; p++) {
        const int64_t at = (image * pixels + p) * s.channels;
        const T* x = static_cast<const T*>(buffers[s.x]) + at;
        const T* residual = s.residual < 0 ? nullptr : static_cast<const T*>(buffers[s.residual]) + at;
        T* y = static_cast<T*>(buffers[s.y]) + at;
        for (int64_t c = 0; c < s.channels; c += LANES) {
            const int count = int(std::min<int64_t>(LANES, s.channels - c));
            Vec z = load(x + c, count);
            if (gate) z *= load(gate + c, count);
            z = z * load(s.scale + c, count) + load(s.shift + c, count);
            if (residual) z += load(residual + c, count);
            store(y + c, activate<T>(z, int(s.activation)), count);
        }
    }
}

/// The largest of a vector's numbers in some rows and columns, NaN where there is one; or their sum.
template <typename T, bool SUM>
ALWAYS Vec of_window(const T* x, int64_t rows, int64_t down, int64_t columns, int64_t across, int count) {
    Vec found = all(SUM ? 0.0f : -std::numeric_limits<float>::infinity()), odd = {};
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) {
            const Vec z = load(x + i * down + j * across, count);
            if (SUM) found += z;
            else found = at_least(found, z), odd += z * 0.0f;
        }
    if (SUM || none(odd != odd)) return found;
    for (int64_t i = 0; i < rows; i++)  // infinities, or what is no number: what came behind it took its place
        for (int64_t j = 0; j < columns; j++) {
            const Vec z = load(x + i * down + j * across, count);
            found = z != z ? z : found;
        }
    return found;
}

/// Of y = the largest x in the window of each pixel, or the mean of those that are in the image, some pixels.
template <typename T, bool MEAN>
void window_chunk(const Step& s, void* const* buffers, int64_t chunk, int64_t bands, int64_t band) {
    const int64_t image = chunk / bands, first = chunk % bands * band, pixels = s.out_height * s.out_width;
    const int64_t end = std::min(first + band, pixels), whole = s.channels / LANES * LANES;
    const T* x = static_cast<const T*>(buffers[s.x]) + image * s.height * s.width * s.channels;
    T* y = static_cast<T*>(buffers[s.y]) + image * pixels * s.channels;
    const int64_t down = s.dilation[0] * s.width * s.channels, across = s.dilation[1] * s.channels;
    const auto inside = [&](int dim, int64_t at, int64_t size) {  // which of the window's rows or columns are
        const int64_t begin = at * s.stride[dim] - s.padding[dim], apart = s.dilation[dim];
        const int64_t out = begin < 0 ? divided(-begin, apart) : 0;
        return Rows{begin + out * apart, std::min(s.kernel[dim], begin < size ? divided(size - begin, apart) : 0) - out};
    };
    for (int64_t p = first; p < end; p++) {
        const Rows rows = inside(0, p / s.out_width, s.height), columns = inside(1, p % s.out_width, s.width);
        const T* from = x + (rows.first * s.width + columns.first) * s.channels;
        const auto put = [&](int64_t c, int count) {
            const Vec found = of_window<T, MEAN>(from + c, rows.count, down, columns.count, across, count);
            store(y + p * s.channels + c, MEAN ? found / float(rows.count * columns.count) : found, count);
        };
        for (int64_t c = 0; c < whole; c += LANES) put(c, LANES);
        if (whole < s.channels) put(whole, int(s.channels - whole));
    }
}

/// y[n][c] = the mean over the pixels of activation(x * scale + shift), of some channels.
template <typename T>
void average_chunk(const Step& s, void* const* buffers, int64_t chunk, int64_t bands) {
    const int64_t image = chunk / bands, first = chunk % bands * AVERAGED;
    const T* x = static_cast<const T*>(buffers[s.x]) + image * s.height * s.width * s.channels;
    T* y = static_cast<T*>(buffers[s.y]) + image * s.channels;
    for (int64_t c = first; c < std::min(first + AVERAGED, s.channels); c += LANES) {
        const int count = int(std::min<int64_t>(LANES, s.channels - c));
        Vec total = {};
        for (int64_t row = 0; row < s.height; row++) {
            Vec sum = {};
            for (int64_t p = row * s.width; p < (row + 1) * s.width; p++) {
                Vec z = load(x + p * s.channels + c, count);
                if (s.scale) z = activate<T>(z * load(s.scale + c, count) + load(s.shift + c, count), int(s.before));
                sum += z;
            }
            total += sum;
        }
        store(y + c, total * (1.0f / float(s.height * s.width)), count);
    }
}

struct Work {
    Step step;
    std::unique_ptr<Conv> conv;
    std::unique_ptr<Winograd> winograd;
    std::unique_ptr<Depthwise> depthwise;
    std::unique_ptr<Matrix> matrix;
    int64_t chunks = 0, bands = 1, band = 0;

    Work(const Step& given, int threads) : step(given) {
        if (step.kind == CONV && step.way == WINOGRAD) {
            winograd.reset(new Winograd(step));
            chunks = winograd->chunks();
        } else if (step.kind == CONV && step.way == DEPTHWISE) {
            depthwise.reset(new Depthwise(step));
            chunks = depthwise->chunks();
        } else if (step.kind == CONV && step.way == MATRIX) {
            matrix.reset(new Matrix(step, threads));
            chunks = matrix->chunks();
        } else if (step.kind == CONV) {
            conv.reset(new Conv(step));
            chunks = conv->chunks();
        } else if (step.kind == MEANS) {
            chunks = step.images;
        } else if (step.kind == AVERAGE) {
            bands = divided(step.channels, AVERAGED);
            chunks = step.images * bands;
        } else {
            const bool window = step.kind == LARGEST || step.kind == WINDOW_MEAN;
            const int64_t pixels = window ? step.out_height * step.out_width : step.height * step.width;
            band = std::min(pixels, divided(MAP_CHUNK, step.channels));
            bands = divided(pixels, band);
            chunks = step.images * bands;
        }
    }

    int64_t panel() const { return winograd ? winograd->panel : matrix ? matrix->panel : conv ? conv->panel : 0; }

    /// What a thread will ask for first, where the step before has the time to bring it near.
    Asked asked(int thread, int threads) const {
        if (!matrix) return {};
        const auto [begin, end] = matrix->first_weights(thread, threads);
        return {static_cast<const char*>(step.weight) + begin, static_cast<const char*>(step.weight) + end};
    }

    void run(int64_t number, void* const* buffers, int64_t chunk, Scratch& scratch) const {
        if (step.kind == MEANS) {
            means_chunk(step, buffers, chunk);
        } else if (step.kind == AFFINE) {
            step.bfloat16 ? affine_chunk<Bf16>(step, buffers, chunk, bands, band)
                          : affine_chunk<float>(step, buffers, chunk, bands, band);
        } else if (step.kind == LARGEST) {
            step.bfloat16 ? window_chunk<Bf16, false>(step, buffers, chunk, bands, band)
                          : window_chunk<float, false>(step, buffers, chunk, bands, band);
        } else if (step.kind == WINDOW_MEAN) {
            step.bfloat16 ? window_chunk<Bf16, true>(step, buffers, chunk, bands, band)
                          : window_chunk<float, true>(step, buffers, chunk, bands, band);
        } else if (step.kind == AVERAGE) {
            step.bfloat16 ? average_chunk<Bf16>(step, buffers, chunk, bands)
                          : average_chunk<float>(step, buffers, chunk, bands);
        } else if (winograd) {
            winograd_chunk(*winograd, number, buffers, chunk, scratch);
        } else if (depthwise) {
            step.bfloat16 ? depthwise_chunk<Bf16>(*depthwise, buffers, chunk)
                          : depthwise_chunk<float>(*depthwise, buffers, chunk);
        } else if (matrix) {
            matrix_chunk(*matrix, number, buffers, chunk, scratch);
        } else if (step.bfloat16) {
            conv_chunk<Pairs, Bf16>(*conv, number, buffers, chunk, scratch);
        } else {
            conv_chunk<Singles, float>(*conv, number, buffers, chunk, scratch);
        }
    }
};

struct Program {
    std::vector<Work> steps;
    int64_t scratch = 0;
    mutable Pace pace;
};

/// How far a step is: the chunks of each thread's range that were begun, and how many of all are done.
struct alignas(64) Begun {
    std::atomic<int64_t> next{0};
};

struct alignas(64) Done {
    std::atomic<int32_t> count{0}, asleep{0};
};

void add_one(Done& done, int64_t chunks) {
    if (done.count.fetch_add(1) + 1 == chunks && done.asleep.load() > 0)
        syscall(SYS_futex, &done.count, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

/// Spins for about a millisecond, then sleeps: on a busy machine who was asleep is soon given a core, and who yields is not.
void wait_for(Done& done, int64_t chunks) {
    for (int spins = 0; spins < SPINS; spins++) {
        if (done.count.load(std::memory_order_acquire) >= chunks) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    done.asleep.fetch_add(1);
    for (int32_t count = done.count.load(); count < chunks; count = done.count.load())
        syscall(SYS_futex, &done.count, FUTEX_WAIT_PRIVATE, count, nullptr, nullptr, 0);
}

/// One thread's part of a run; behind `stop` nothing is computed any more. `ended` is null, or takes when each step ended.
void run_steps(const Program& program, void* const* buffers, char* memory, int thread, int threads, Begun* begun,
               Done* done, const std::atomic<bool>& stop, double* ended) {
    Scratch scratch{memory + thread * program.scratch};
    for (size_t i = 0; i < program.steps.size(); i++) {
        const Work& work = program.steps[i];
        scratch.asked = i + 1 < program.steps.size() ? program.steps[i + 1].asked(thread, threads) : Asked{};
        for (int other = 0; other < threads; other++) {
            const int owner = (thread + other) % threads;
            const int64_t end = work.chunks * (owner + 1) / threads, start = work.chunks * owner / threads;
            Begun& own = begun[i * threads + owner];
            while (own.next.load(std::memory_order_relaxed) < end - start) {
                const int64_t chunk = start + own.next.fetch_add(1, std::memory_order_relaxed);
                if (chunk >= end) break;
                if (!stop.load(std::memory_order_relaxed)) work.run(int64_t(i), buffers, chunk, scratch);
                add_one(done[i], work.chunks);
            }
        }
        wait_for(done[i], work.chunks);
        if (ended) ended[i] = now().wall;
    }
}

/// Whether this process was forked from one whose threads had run a program: they are not here, and would be waited for.
bool alone_after_fork() {
    static std::atomic<bool> forked{false};
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return registered != 0 || forked;
}

}  // namespace

extern "C" {

/// The lanes of a vector.
int64_t lanes() { return LANES; }

/// Whether the matrix unit is there, and this process may use it.
int has_matrix_unit() { return HAS_AMX && amx_allowed(); }

/// Ask the system for large pages where memory, which nobody has written to, begins with one.
void ask_for_large_pages(void* memory, int64_t size) { madvise(memory, size_t(size), MADV_HUGEPAGE); }

/// Bytes of a convolution's weights as they are laid out.
int64_t packed_size(const Step* step) {
    if (step->way == WINOGRAD) return Winograd(*step).size() * 4;
    if (step->way == DEPTHWISE) return Depthwise(*step).size() * 4;
    if (step->way == MATRIX) return Matrix(*step).size() * 2;
    const Conv conv(*step);
    int64_t size = 0;
    for (const Channels& tile : conv.tiles) size += conv.taps * conv.units * tile.vectors * LANES * 4;
    return size;
}

/// Lay out the weights of a convolution, given as (K, C / groups, R, S) in float32.
void pack_weight(const Step* step, const float* weight, void* packed, int threads) {
    if (alone_after_fork()) threads = 1;
    if (step->way == WINOGRAD) return pack_winograd(Winograd(*step), weight, static_cast<float*>(packed), threads);
    if (step->way == DEPTHWISE) return pack_depthwise(Depthwise(*step), weight, static_cast<float*>(packed));
    if (step->way == MATRIX) return pack_matrix(Matrix(*step), weight, static_cast<Bf16*>(packed), threads);
    const Conv conv(*step);
    step->bfloat16 ? pack<Pairs>(conv, weight, packed, threads) : pack<Singles>(conv, weight, packed, threads);
}

/// Into how many sums for each image and channel a convolution adds its results.
int64_t bands_of(const Step* step) {
    return step->way == WINOGRAD    ? Winograd(*step).bands
           : step->way == DEPTHWISE ? Depthwise(*step).bands
           : step->way == MATRIX    ? Matrix(*step).bands
                                    : Conv(*step).bands;
}

/// A program of steps, cut for so many threads, or null where there is no memory for it.
void* new_program(const Step* steps, int64_t count, int threads) {
    try {
        std::unique_ptr<Program> made(new Program);
        for (int64_t i = 0; i < count; i++) {
            made->steps.emplace_back(steps[i], threads);
            made->scratch = std::max(made->scratch, divided(made->steps.back().panel(), 4096) * 4096);
        }
        return made.release();
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void free_program(void* program) { delete static_cast<Program*>(program); }

/// Bytes that each thread needs beside the buffers.
int64_t scratch_size(const void* program) { return static_cast<const Program*>(program)->scratch; }

/// Run a program over its buffers, with scratch memory of `scratch_size` bytes for each thread. The thread that calls
/// asks `check`, unless that is null, whether the result will count, while the others begin. Returns the answer. Unless
/// `seconds` is null, it takes the time of each step.
int run_program(const void* given, void* const* buffers, void* scratch, int threads, int (*check)(), double* seconds) {
    const Program& program = *static_cast<const Program*>(given);
    const size_t count = program.steps.size();
    std::unique_ptr<Begun[]> begun(new Begun[count * threads]);
    std::unique_ptr<Done[]> done(new Done[count]);
    std::atomic<bool> stop{false};
    const bool several = threads > 1 && !alone_after_fork(), helped = several && program.pace.helped();
    if (!helped) threads = 1;
    Times before = {};
    const auto work = [&](int thread) {
        if (thread == 0) {
            if (check) stop = !check();
            before = now();
        }
        run_steps(program, buffers, static_cast<char*>(scratch), thread, threads, begun.get(), done.get(), stop,
                  thread == 0 ? seconds : nullptr);
    };
    if (threads == 1) {
        work(0);
    } else {
#if defined(__SANITIZE_THREAD__)  // it does not know OpenMP's barriers
        std::vector<std::thread> helpers;
        for (int thread = 1; thread < threads; thread++) helpers.emplace_back(work, thread);
        work(0);
        for (std::thread& helper : helpers) helper.join();
#else
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num());
#endif
    }
    const Times after = now();
    for (size_t i = seconds ? count : 0; i-- > 0;) seconds[i] -= i > 0 ? seconds[i - 1] : before.wall;
    if (several && !stop) program.pace.add(helped, {after.wall - before.wall, after.cpu - before.cpu});
    return !stop;
}

}  // extern "C"
