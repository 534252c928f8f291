// A layer of squeeze-excite, of which two launches lead from the parts of channel means to the gate:
//
//     out[n, r] = activation(sum_c weight[r, c] * sum_t in[n, t, c] + bias[r])
//
//   in (images, tiles, inputs), weight (outputs, inputs), bias (outputs): float
//   out (images, outputs): T, 16 bits or float
//
// A block computes `rows` outputs from block_y() * rows on, of IMAGES images from block_x() * IMAGES on: few images are
// spread over many blocks, and the weights are read once for IMAGES of them. A warp takes an output for all of its images:
// its lanes read a row of weights together and add up their sums.
#include "grouped_conv.cuh"

template <class T, int IMAGES, int THREADS, int ACTIVATION>
KERNEL(THREADS, 1)
squeeze_excite(
    const float* in, const float* weight, const float* bias, T* out, int images, int tiles, int inputs, int outputs,
    int rows) {
    const unsigned values = shared_base();
    const int lane = thread_x() % 32, warp = thread_x() / 32, image = block_x() * IMAGES, first = block_y() * rows;
    for (int i = thread_x(); i < IMAGES * inputs; i += THREADS) {
        int n = image + i / inputs;
        float total = 0.0f;
        if (n < images)
            for (int t = 0; t < tiles; ++t) total += load_global(in + ((long long)n * tiles + t) * inputs + i % inputs);
        store_shared(values + i * 4, total);
    }
    sync_block();
    for (int r = first + warp; r < first + rows && r < outputs; r += THREADS / 32) {
        float sums[IMAGES] = {}, mine = 0.0f;
#pragma unroll 4
        for (int c = lane; c < inputs; c += 32) {
            float factor = load_global(weight + (long long)r * inputs + c);
#pragma unroll
            for (int n = 0; n < IMAGES; ++n) sums[n] += factor * load_shared<float>(values + (n * inputs + c) * 4);
        }
#pragma unroll
        for (int n = 0; n < IMAGES; ++n) {
#pragma unroll
            for (int mask = 16; mask; mask /= 2) sums[n] += shuffle_xor(sums[n], mask);
            if (lane == n) mine = sums[n];
        }
        if (lane >= IMAGES || image + lane >= images) continue;
        mine = activate<ACTIVATION>(mine + load_global(bias + r));
        T* to = out + (long long)(image + lane) * outputs + r;
        if constexpr (sizeof(T) == 4)
            store_global(to, mine);
        else
            store_global(to, T{static_cast<unsigned short>(narrow<T>(mine, mine))});
    }
}
