// Depthwise 3x3 convolution, padding 1, stride 1 or 2, with bias, activation and parts of the channel means:
//
//     y[p, c] = activation(sum_tap x[STRIDE p + tap - 1, c] * weight[tap, c] + bias[c])
//     parts[tile, c] = sum of y over the tile's pixels / pixels of an image
//
//   x (images, height, columns, channels), y (images, out_height, out_columns, channels), weight (9, channels): T
//   bias (channels) or null, parts (images * tiles of an image, channels), with PARTS: float
//
// A thread computes RUN output pixels beside each other of eight channels, from registers. Block (i, j) computes tile i,
// THREADS / LANES runs of one image in reading order, and LANES times eight channels.
#include "depthwise_conv.cuh"

template <class T, int LANES, int RUN, int THREADS, int STRIDE, int ACTIVATION, bool PARTS>
KERNEL(THREADS, 1)
depthwise_conv_forward(
    const T* x, const T* weight, const float* bias, T* y, float* parts, int tiles, int height, int columns,
    int out_height, int out_columns, int channels) {
    constexpr int SPAN = (RUN - 1) * STRIDE + 3;
    const int image = block_x() / tiles, first = block_y() * LANES * 8, channel = first + thread_x() % LANES * 8;
    const int runs = ceil_div(out_columns, RUN), run = block_x() % tiles * (THREADS / LANES) + thread_x() / LANES;
    const int h = run / runs, w = run % runs * RUN;
    Channels total = {};
    if (h < out_height && channel < channels) {
        Channels sums[RUN];
        const Channels start = bias ? load_channels(bias + channel) : Channels{};
#pragma unroll
        for (int i = 0; i < RUN; ++i) sums[i] = start;
        const T* map = x + (long long)image * height * columns * channels + channel;
#pragma unroll
        for (int kh = 0; kh < 3; ++kh) {
            const int row = h * STRIDE + kh - 1;
            if (row < 0 || row >= height) continue;
            Eight taps[3], pixels[SPAN];
#pragma unroll
            for (int kw = 0; kw < 3; ++kw) taps[kw] = load_eight(weight + (kh * 3 + kw) * channels + channel);
#pragma unroll
            for (int i = 0; i < SPAN; ++i) {
                int column = w * STRIDE + i - 1;
                bool inside = column >= 0 && column < columns;
                pixels[i] = inside ? load_eight(map + (row * columns + column) * channels) : Eight{};
            }
#pragma unroll
            for (int kw = 0; kw < 3; ++kw) {
                const Channels tap = spread<T>(taps[kw]);
#pragma unroll
                for (int i = 0; i < RUN; ++i) {
                    const Channels pixel = spread<T>(pixels[i * STRIDE + kw]);
#pragma unroll
                    for (int c = 0; c < 8; ++c) sums[i].of[c] += pixel.of[c] * tap.of[c];
                }
            }
        }
        T* result = y + (long long)image * out_height * out_columns * channels + channel;
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            if (w + i >= out_columns) continue;
#pragma unroll
            for (int c = 0; c < 8; ++c) sums[i].of[c] = activate<ACTIVATION>(sums[i].of[c]);
            const Eight value = gathered<T>(sums[i]);
            store_global(reinterpret_cast<Eight*>(result + (h * out_columns + w + i) * channels), value);
            if constexpr (PARTS) {
                const Channels rounded = spread<T>(value);
#pragma unroll
                for (int c = 0; c < 8; ++c) total.of[c] += rounded.of[c];
            }
        }
    }
    if constexpr (PARTS)
        sum_of_block<THREADS, LANES>(
            total, 1.0f / (out_height * out_columns), parts + (long long)block_x() * channels + first, channels - first);
}
