// What a CPU's arithmetic and memory give when nothing is in their way.

#include "vector.h"

namespace {

constexpr int CHAINS = 12;  // hide the latency of a product, and lie in registers with its operands

/// CHAINS steps that do not wait for each other, again and again on every thread, each of so many operations. Returns
/// the operations done; what they computed goes to `result`, or no compiler would keep them.
template <typename Step>
double repeat(int64_t rounds, int threads, int operations, float* result, Step step) {
    double done = 0;
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : done, total)
    {
        Vec sums[CHAINS];
        for (int i = 0; i < CHAINS; i++) sums[i] = all(float(i));
        for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
            for (int i = 0; i < CHAINS; i++) sums[i] = step(sums[i]);
        }
        for (int i = 0; i < CHAINS; i++) total += sums[i][0];
        done += double(rounds) * CHAINS * operations;
    }
    *result = total;
    return done;
}

}  // namespace

extern "C" {

/// sum = sum * factor + shift in float32.
double multiply_adds(int64_t rounds, int threads, float factor, float shift, float* result) {
    const Vec w = all(factor), b = all(shift);
    return repeat(rounds, threads, 2 * LANES, result, [=](Vec sum) { return Singles::plus(b, sum, w); });
}

/// sum += x0 * w0 + x1 * w1 with x and w in bfloat16. Returns 0 where the processor has no such instruction.
double pair_products(int64_t rounds, int threads, uint32_t x_bits, uint32_t w_bits, float* result) {
    if (Pairs::PER_UNIT == 1) return 0;
    Pairs::Unit x, w;
    std::memcpy(&x, &x_bits, 4), std::memcpy(&w, &w_bits, 4);
    const Pairs::Operand xs = Pairs::repeated<1>(&x), ws = Pairs::repeated<1>(&w);
    return repeat(rounds, threads, 4 * LANES, result, [=](Vec sum) { return Pairs::plus(sum, xs, ws); });
}

/// y = a + factor * b: three arrays of so many floats.
void triad(float* y, const float* a, const float* b, float factor, int64_t floats, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < floats; i++) y[i] = a[i] + factor * b[i];
}

}  // extern "C"
