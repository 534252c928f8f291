// Squeeze-excite from the parts of channel means to the gate, in one launch:
//
//     h[n, r] = activation(sum_c fc1[r, c] * sum_t parts[n, t, c] + bias1[r])
//     gate[n, c] = sigmoid(sum_r fc2[c, r] * h[n, r] + bias2[c])
//
//   parts (images, tiles, channels), fc1 (hidden, channels), bias1 (hidden), fc2 (channels, hidden), bias2 (channels): float
//   gate (images, channels): T, 16 bits or float; channels is even
//
// A block computes IMAGES images. A warp takes one hidden channel, then two of the gate, for all of them: its lanes read
// a row of weights together and add up their sums.
#include "grouped_conv.cuh"

template <class T, int IMAGES, int THREADS, int ACTIVATION>
KERNEL(THREADS, 1)
squeeze_excite(
    const float* parts, const float* fc1, const float* bias1, const float* fc2, const float* bias2, T* gate, int images,
    int tiles, int channels, int hidden) {
    const unsigned means = shared_base(), values = means + IMAGES * channels * 4;
    const int lane = thread_x() % 32, warp = thread_x() / 32, image = block_x() * IMAGES;
    for (int i = thread_x(); i < IMAGES * channels; i += THREADS) {
        int n = image + i / channels;
        float total = 0.0f;
        if (n < images)
            for (int t = 0; t < tiles; ++t)
                total += load_global(parts + ((long long)n * tiles + t) * channels + i % channels);
        store_shared(means + i * 4, total);
    }
    sync_block();
    for (int r = warp; r < hidden; r += THREADS / 32) {
        float sums[IMAGES] = {};
        for (int c = lane; c < channels; c += 32) {
            float weight = load_global(fc1 + (long long)r * channels + c);
#pragma unroll
            for (int n = 0; n < IMAGES; ++n) sums[n] += weight * load_shared<float>(means + (n * channels + c) * 4);
        }
#pragma unroll
        for (int n = 0; n < IMAGES; ++n) {
#pragma unroll
            for (int mask = 16; mask; mask /= 2) sums[n] += shuffle_xor(sums[n], mask);
            if (lane == 0) store_shared(values + (n * hidden + r) * 4, activate<ACTIVATION>(sums[n] + load_global(bias1 + r)));
        }
    }
    sync_block();
    for (int c = 2 * warp; c < channels; c += THREADS / 16) {
        float low[IMAGES] = {}, high[IMAGES] = {};
        for (int r = lane; r < hidden; r += 32) {
            float first = load_global(fc2 + (long long)c * hidden + r);
            float second = load_global(fc2 + (long long)(c + 1) * hidden + r);
#pragma unroll
            for (int n = 0; n < IMAGES; ++n) {
                float value = load_shared<float>(values + (n * hidden + r) * 4);
                low[n] += first * value, high[n] += second * value;
            }
        }
#pragma unroll
        for (int n = 0; n < IMAGES; ++n) {
#pragma unroll
            for (int mask = 16; mask; mask /= 2) {
                low[n] += shuffle_xor(low[n], mask);
                high[n] += shuffle_xor(high[n], mask);
            }
            if (lane == 0 && image + n < images) {
                const Floats2 pair = {
                    sigmoid(low[n] + load_global(bias2 + c)), sigmoid(high[n] + load_global(bias2 + c + 1))};
                T* to = gate + (long long)(image + n) * channels + c;
                if constexpr (sizeof(T) == 4)
                    store_global(reinterpret_cast<Floats2*>(to), pair);
                else
                    store_global(reinterpret_cast<unsigned*>(to), narrow<T>(pair.x, pair.y));
            }
        }
    }
}
