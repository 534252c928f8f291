// Both gradients of a depthwise 3x3 convolution with padding 1, stride 1 or 2, alone or in a single pass:
//
//     dy = a * dz + q * y + b                                  AFFINE: 2; 1: a * dz; 0: dz. Zero outside the image
//     da[p, c] = sum_tap dy[(p + 1 - tap) / STRIDE, c] * weight[tap, c]                        over whole quotients
//     dx = da * activation'(x * scale + shift)                 with SUMS; else dx = da
//     sums[tile, 0, c] = sum of dx * (x - mean) * invstd over the tile's pixels, sums[tile, 1, c] = sum of dx
//     parts[worker, tap, c] = sum_p read(x)[p, c] * dy[(p + 1 - tap) / STRIDE, c]               over the worker's tiles
//     read(x) = activation(x * scale + shift)                  with NORM; else x
//
//   x, dx (images, height, columns, channels), dz, y (images, out_height, out_columns, channels), weight (9, channels): T
//   a, q, b, scale, shift, mean, invstd (channels): float
//   parts (workers, 9, channels), sums (images * tiles of an image, 2, channels): float
//
// INPUT makes dx, WEIGHT parts. A thread takes RUN pixels of dy beside each other, the pixels of x that lie over them,
// STRIDE^2 each, and eight channels. Block (i, j) walks over the tiles i + k grid_x(), THREADS / LANES runs of one image
// in reading order, of LANES times eight channels.
#include "depthwise_conv.cuh"

template <
    class T, int LANES, int RUN, int THREADS, int STRIDE, bool INPUT, bool WEIGHT, int AFFINE, bool NORM, bool SUMS,
    int ACTIVATION>
KERNEL(THREADS, 1)
depthwise_conv_backward(
    const T* dz, const T* y, const float* a, const float* q, const float* b, const T* x, const float* scale,
    const float* shift, const float* mean, const float* invstd, const T* weight, T* dx, float* sums, float* parts,
    int images, int tiles, int height, int columns, int out_height, int out_columns, int channels) {
    using Class = Classes<STRIDE>;
    constexpr int HALO = STRIDE == 1 ? 2 : 1, SPAN = RUN + HALO;
    const int first = block_y() * LANES * 8, channel = first + thread_x() % LANES * 8;
    const int runs = ceil_div(out_columns, RUN);
    const bool known = channel < channels;
    Channels gradient[WEIGHT ? 9 : 1] = {};
    for (int tile = block_x(); tile < images * tiles; tile += grid_x()) {
        const int image = tile / tiles, run = tile % tiles * (THREADS / LANES) + thread_x() / LANES;
        const int h = run / runs, w = run % runs * RUN;
        const long long base = (long long)image * height * columns * channels + channel;
        const long long out_base = (long long)image * out_height * out_columns * channels + channel;
        Channels product = {}, plain = {};
        if (h < out_height && known) {
            auto inside = [&](int which, int i) {
                return h * STRIDE + which / STRIDE < height && (w + i) * STRIDE + which % STRIDE < columns;
            };
            auto offset = [&](int which, int i) {
                return ((h * STRIDE + which / STRIDE) * columns + (w + i) * STRIDE + which % STRIDE) * channels;
            };
            Eight inputs[WEIGHT ? Class::COUNT : 1][RUN] = {};
            if constexpr (WEIGHT) {
#pragma unroll
                for (int which = 0; which < Class::COUNT; ++which) {
#pragma unroll
                    for (int i = 0; i < RUN; ++i) {
                        if (!inside(which, i)) continue;
                        inputs[which][i] = load_eight(x + base + offset(which, i));
                        if constexpr (NORM) {
                            const Channels factor = load_channels(scale + channel), summand = load_channels(shift + channel);
                            Channels read = spread<T>(inputs[which][i]);
#pragma unroll
                            for (int c = 0; c < 8; ++c)
                                read.of[c] = activate<ACTIVATION>(read.of[c] * factor.of[c] + summand.of[c]);
                            inputs[which][i] = gathered<T>(read);
                        }
                    }
                }
            }
            Channels found[INPUT ? Class::COUNT : 1][RUN] = {};
#pragma unroll
            for (int r = 0; r <= HALO; ++r) {
                const int row = h + r - HALO / 2;
                if (row < 0 || row >= out_height) continue;
                Eight made[SPAN];
#pragma unroll
                for (int i = 0; i < SPAN; ++i) {
                    const int column = w + i - HALO / 2;
                    made[i] = Eight{};
                    if (column < 0 || column >= out_columns) continue;
                    const long long at = out_base + (row * out_columns + column) * channels;
                    made[i] = load_eight(dz + at);
                    if constexpr (AFFINE != 0) {
                        Channels value = spread<T>(made[i]);
                        const Channels factor = load_channels(a + channel);
#pragma unroll
                        for (int c = 0; c < 8; ++c) value.of[c] *= factor.of[c];
                        if constexpr (AFFINE == 2) {
                            const Channels raw = spread<T>(load_eight(y + at)), slope = load_channels(q + channel);
                            const Channels constant = load_channels(b + channel);
#pragma unroll
                            for (int c = 0; c < 8; ++c) value.of[c] += raw.of[c] * slope.of[c] + constant.of[c];
                        }
                        made[i] = gathered<T>(value);
                    }
                }
#pragma unroll
                for (int which = 0; which < Class::COUNT; ++which) {
#pragma unroll
                    for (int place = 0; place < Class::taps(which); ++place) {
                        const int tap = Class::tap(Class::first(which) + place);
                        if (Class::shift(tap / 3) != r) continue;
                        Channels factor = {};
                        if constexpr (INPUT) factor = spread<T>(load_eight(weight + tap * channels + channel));
#pragma unroll
                        for (int i = 0; i < RUN; ++i) {
                            const Channels dy = spread<T>(made[i + Class::shift(tap % 3)]);
                            if constexpr (INPUT) {
#pragma unroll
                                for (int c = 0; c < 8; ++c) found[which][i].of[c] += dy.of[c] * factor.of[c];
                            }
                            if constexpr (WEIGHT) {
                                const Channels read = spread<T>(inputs[which][i]);
#pragma unroll
                                for (int c = 0; c < 8; ++c) gradient[tap].of[c] += read.of[c] * dy.of[c];
                            }
                        }
                    }
                }
            }
            if constexpr (INPUT) {
#pragma unroll
                for (int which = 0; which < Class::COUNT; ++which) {
#pragma unroll
                    for (int i = 0; i < RUN; ++i) {
                        if (!inside(which, i)) continue;
                        Channels& value = found[which][i];
                        if constexpr (SUMS) {
                            const Channels raw = spread<T>(load_eight(x + base + offset(which, i)));
                            const Channels factor = load_channels(scale + channel), summand = load_channels(shift + channel);
                            const Channels centre = load_channels(mean + channel), width = load_channels(invstd + channel);
#pragma unroll
                            for (int c = 0; c < 8; ++c)
                                value.of[c] *= slope<ACTIVATION>(raw.of[c] * factor.of[c] + summand.of[c]);
                            const Channels rounded = spread<T>(gathered<T>(value));
#pragma unroll
                            for (int c = 0; c < 8; ++c) {
                                product.of[c] += rounded.of[c] * (raw.of[c] - centre.of[c]) * width.of[c];
                                plain.of[c] += rounded.of[c];
                            }
                        }
                        store_global(reinterpret_cast<Eight*>(dx + base + offset(which, i)), gathered<T>(value));
                    }
                }
            }
        }
        if constexpr (SUMS) {
            float* to = sums + (long long)tile * 2 * channels + first;
            sum_of_block<THREADS, LANES>(product, 1.0f, to, channels - first);
            sum_of_block<THREADS, LANES>(plain, 1.0f, to + channels, channels - first);
        }
    }
    if constexpr (WEIGHT) {
#pragma unroll
        for (int tap = 0; tap < 9; ++tap)
            sum_of_block<THREADS, LANES>(
                gradient[tap], 1.0f, parts + ((long long)block_x() * 9 + tap) * channels + first, channels - first);
    }
}
