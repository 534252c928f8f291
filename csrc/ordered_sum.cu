// Sums of equal terms in their order: result[i] = ((terms[0, i] + terms[1, i]) + terms[2, i]) + ...
//
//   terms (count, length), result (length): float; length a multiple of four
#include <primitives.cuh>

template <int THREADS>
KERNEL(THREADS, 1) ordered_sum(const float* terms, float* result, int count, int length) {
    int i = (block_x() * THREADS + thread_x()) * 4;
    if (i >= length) return;
    Floats4 total = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int t = 0; t < count; ++t) {
        Floats4 term = load_global(reinterpret_cast<const Floats4*>(terms + (long long)t * length + i));
        total.x += term.x, total.y += term.y, total.z += term.z, total.w += term.w;
    }
    store_global(reinterpret_cast<Floats4*>(result + i), total);
}
