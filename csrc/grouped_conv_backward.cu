// Both gradients of a grouped 3x3 convolution with padding 1, stride 1 or 2, alone or in a single pass:
//
//     dy = a * dz + q * y + b                                  AFFINE: 2; 1: a * dz; 0: dz. Zero outside the image
//     da[p, g, c] = sum_(tap, k) dy[(p + 1 - tap) / STRIDE, g, k] * weight[g, k, tap, c]       over whole quotients
//     dx = da * activation'(x * scale + shift)                 with SUMS; else dx = da
//     sums[tile, 0, g, c] = sum of dx * (x - mean) * invstd over the tile's pixels, sums[tile, 1, g, c] = sum of dx
//     parts[worker, g, k, tap, c] = sum_p read(x)[p, g, c] * dy[(p + 1 - tap) / STRIDE, g, k]   over the worker's tiles
//     read(x) = activation(x * scale + shift)                  with NORM; else x
//
//   x, dx (images, height, columns, groups * WIDTH), dz, y (images, out_height, out_columns, groups * WIDTH): T
//   weight (groups * WIDTH, 9 * WIDTH), a row for each c, tap by tap: T
//   a, q, b, scale, shift, mean, invstd (groups * WIDTH): float
//   parts (workers, groups * WIDTH, 9, WIDTH), sums (images * tiles of an image, 2, groups * WIDTH): float
//
// INPUT makes dx, WEIGHT parts. A tile is TILE_H x TILE_W pixels of dy and the STRIDE^2 times as many of x that lie over
// them. With a stride the pixels of x fall into four classes by their remainders, each of which has taps of its own, so
// that nothing is multiplied in vain; taps are ordered by class. Both products read the same dy, a halo tile that every
// thread makes of dz and y where it copied them. Blocks, slabs and steps are the forward kernel's, with k for its input
// channels and c for its outputs; a weight gradient alone has a slab for each CHUNK of k as well.
#include "grouped_conv.cuh"

template <
    class T, int WIDTH, int GROUPS, int CHUNK, int OUT_TILE, int UNIT, int STRIDE, int TILE_H, int TILE_W, int WARPS_M,
    int WARPS_N, int STAGES, bool INPUT, bool WEIGHT, int AFFINE, bool NORM, bool SUMS, int ACTIVATION>
KERNEL(32 * WARPS_M * WARPS_N, 1)
grouped_conv_backward(
    const T* dz, const T* y, const float* a, const float* q, const float* b, const T* x, const float* scale,
    const float* shift, const float* mean, const float* invstd, const T* weight, T* dx, float* sums, float* parts,
    int images, int height, int columns, int out_height, int out_columns, int groups) {
    using Class = Classes<STRIDE>;
    constexpr int THREADS = 32 * WARPS_M * WARPS_N, PIXELS = TILE_H * TILE_W, CHUNKS = CHUNK / 8, DEPTH = 9 * CHUNKS;
    constexpr int SIXTEENS = ceil_div(PIXELS, 16 * WARPS_M), UNITS_IN_GROUP = OUT_TILE / (8 * UNIT);
    constexpr int UNITS = GROUPS * UNITS_IN_GROUP, OUT_TILES = ceil_div(WIDTH, OUT_TILE), SPLITS = ceil_div(WIDTH, CHUNK);
    constexpr int STEPS = INPUT ? SPLITS : 1, HALO = STRIDE == 1 ? 2 : 1;
    constexpr bool RESIDENT = STEPS == 1;
    static_assert(PIXELS % 16 == 0, "pixels are terms of a sum, in sixteens");
    static_assert(CHUNK % 8 == 0 && OUT_TILE % (8 * UNIT) == 0, "channels in eights");
    static_assert(GROUPS == 1 || (SPLITS == 1 && OUT_TILE == WIDTH), "several groups only as a whole");
    static_assert(RESIDENT || UNITS == WARPS_N, "sums that outlive a step are one unit for each warp");
    static_assert(!WEIGHT || UNITS == WARPS_N, "gradients of weights are one unit for each warp");
    static_assert(!(INPUT && WEIGHT) || SPLITS == 1, "a single pass only of whole groups");

    using Halo = Tile<TILE_H + HALO, TILE_W + HALO, GROUPS * CHUNKS>;
    using Inputs = Tile<TILE_H * STRIDE, TILE_W * STRIDE, GROUPS * OUT_TILE / 8, STRIDE == 2>;
    constexpr int WEIGHT_PITCH = odd_pitch(DEPTH), WEIGHT_BYTES = INPUT ? GROUPS * OUT_TILE * WEIGHT_PITCH : 0;
    constexpr int INPUTS_AT = (AFFINE == 2 ? 2 : 1) * Halo::BYTES, WEIGHTS_AT = INPUTS_AT + (WEIGHT ? Inputs::BYTES : 0);
    constexpr int STAGE_BYTES = WEIGHTS_AT + (RESIDENT ? 0 : WEIGHT_BYTES);
    constexpr int RESULT_PITCH = odd_pitch(UNIT), RESULT_BYTES = INPUT ? SIXTEENS * 16 * RESULT_PITCH : 0;
    const unsigned stages = shared_base(), weights = stages + STAGES * STAGE_BYTES;
    const unsigned results = weights + (RESIDENT ? WEIGHT_BYTES : 0), column_sums = results + WARPS_M * WARPS_N * RESULT_BYTES;

    const int lane = thread_x() % 32, warp = thread_x() / 32, warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
    const int channels = groups * WIDTH, down = ceil_div(out_height, TILE_H), across = ceil_div(out_columns, TILE_W);
    const int split = INPUT ? 0 : block_y() % SPLITS, slab = INPUT ? block_y() : block_y() / SPLITS;
    const int group = slab / OUT_TILES * GROUPS, first_out = slab % OUT_TILES * OUT_TILE;
    const int known_groups = groups - group < GROUPS ? groups - group : GROUPS;
    const int tiles = images * down * across;
    const int steps = ceil_div(tiles - block_x(), grid_x()) * STEPS;
    const unsigned result = results + warp * RESULT_BYTES;

    auto copy_weights = [&](unsigned address, int first_channel) {
#pragma unroll 1
        for (int i = thread_x(); i < GROUPS * OUT_TILE * DEPTH; i += THREADS) {
            int row = i / DEPTH, k = i % DEPTH, channel = first_channel + k % CHUNKS * 8, tap = Class::tap(k / CHUNKS);
            bool known = row / OUT_TILE < known_groups && first_out + row % OUT_TILE < WIDTH && channel < WIDTH;
            long long place = (long long)(group * WIDTH + first_out + row) * (9 * WIDTH) + tap * WIDTH + channel;
            copy_async(address + row * WEIGHT_PITCH + k * 16, known ? weight + place : weight, known);
        }
    };
    auto place_of = [&](int step) { return Place(block_x() + step / STEPS * grid_x(), down, across, TILE_H, TILE_W); };
    auto channel_of = [&](int step) { return (split + step % STEPS) * CHUNK; };
    auto known_of = [&](int channel) { return SPLITS == 1 ? known_groups * CHUNKS : (WIDTH - channel) / 8; };
    const int known_outs = GROUPS > 1 ? known_groups * OUT_TILE / 8 : (WIDTH - first_out) / 8;
    auto copy_step = [&](int step) {
        if (step < steps) {
            Place place = place_of(step);
            int channel = channel_of(step), known = known_of(channel), top = place.top - HALO / 2, left = place.left - HALO / 2;
            long long base = (long long)place.image * out_height * out_columns * channels + group * WIDTH + channel;
            unsigned stage = stages + step % STAGES * STAGE_BYTES;
            Halo::template copy<THREADS>(stage, dz + base, top, left, out_height, out_columns, channels, known);
            if constexpr (AFFINE == 2)
                Halo::template copy<THREADS>(
                    stage + Halo::BYTES, y + base, top, left, out_height, out_columns, channels, known);
            if constexpr (WEIGHT) {
                const T* map = x + (long long)place.image * height * columns * channels + group * WIDTH + first_out;
                Inputs::template copy<THREADS>(
                    stage + INPUTS_AT, map, place.top * STRIDE, place.left * STRIDE, height, columns, channels, known_outs);
            }
            if constexpr (!RESIDENT) copy_weights(stage + WEIGHTS_AT, channel);
        }
        commit_copies();
    };
    // Each thread makes dy and read(x) of the chunks that it copied itself, but for what is outside and stays zero.
    auto make_step = [&](int step) {
        const Place place = place_of(step);
        const unsigned stage = stages + step % STAGES * STAGE_BYTES;
        if constexpr (AFFINE != 0) {
            const int channel = channel_of(step), known = known_of(channel);
            Halo::template visit<THREADS>(stage, [&](int row, int column, int chunk, unsigned at) {
                int h = place.top - HALO / 2 + row, w = place.left - HALO / 2 + column;
                if (h < 0 || h >= out_height || w < 0 || w >= out_columns || chunk >= known) return;
                int first = group * WIDTH + channel + chunk * 8;
                Eight value = load_shared<Eight>(at), raw = {};
                if constexpr (AFFINE == 2) raw = load_shared<Eight>(at + Halo::BYTES);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    Floats2 constant = {0.0f, 0.0f};
                    if constexpr (AFFINE == 2)
                        constant = affine(widen<T>(raw.pair[i]), load_two(q, first + 2 * i), load_two(b, first + 2 * i));
                    Floats2 made = affine(widen<T>(value.pair[i]), load_two(a, first + 2 * i), constant);
                    value.pair[i] = narrow<T>(made.x, made.y);
                }
                store_shared(at, value);
            });
        }
        if constexpr (WEIGHT && NORM) {
            Inputs::template visit<THREADS>(stage + INPUTS_AT, [&](int row, int column, int chunk, unsigned at) {
                if (place.top * STRIDE + row >= height || place.left * STRIDE + column >= columns || chunk >= known_outs)
                    return;
                read_through<T, ACTIVATION>(at, scale, shift, group * WIDTH + first_out + chunk * 8);
            });
        }
    };

    // One class's sums to memory: the warp's pixels, one unit of channels.
    auto finish = [&](const float (&found)[SIXTEENS][UNIT][4], const Place& place, int unit, int which_class) {
        const int which = unit / UNITS_IN_GROUP, row = which * OUT_TILE + unit % UNITS_IN_GROUP * UNIT * 8;
        const int first = first_out + row % OUT_TILE, out = (group + which) * WIDTH + first;
        const int known = which >= known_groups ? 0 : (WIDTH - first) / 8 < UNIT ? (WIDTH - first) / 8 : UNIT;
        const long long image = (long long)place.image * height * columns * channels;
        auto visit = [&](auto each) {
#pragma unroll 1
            for (int i = lane; i < SIXTEENS * 16 * UNIT; i += 32) {
                int n = i % UNIT, local = i / UNIT, pixel = warp_m * SIXTEENS * 16 + local;
                int h = (place.top + pixel / TILE_W) * STRIDE + which_class / STRIDE;
                int w = (place.left + pixel % TILE_W) * STRIDE + which_class % STRIDE;
                bool inside = n < known && pixel < PIXELS && h < height && w < columns;
                each(result + local * RESULT_PITCH + n * 16, image + (h * columns + w) * channels + out + n * 8, inside);
            }
        };
        sync_warp();  // the last results have left
        if constexpr (SUMS) {
            visit([&](unsigned at, long long from, bool inside) {
                store_shared(at, inside ? load_global(reinterpret_cast<const Eight*>(x + from)) : Eight{});
            });
            sync_warp();
        }
#pragma unroll
        for (int n = 0; n < UNIT; ++n) {
            const int channel = out + n * 8 + lane % 4 * 2;
            Floats2 factor = {}, summand = {}, centre = {}, width = {}, product = {}, plain = {};
            if (SUMS && n < known) {
                factor = load_two(scale, channel), summand = load_two(shift, channel);
                centre = load_two(mean, channel), width = load_two(invstd, channel);
            }
#pragma unroll
            for (int j = 0; j < SIXTEENS; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int local = j * 16 + half * 8 + lane / 4;
                    unsigned at = result + local * RESULT_PITCH + n * 16 + lane % 4 * 4;
                    Floats2 value = {found[j][n][2 * half], found[j][n][2 * half + 1]};
                    if constexpr (SUMS) {
                        Floats2 raw = widen<T>(load_shared<unsigned>(at)), z = affine(raw, factor, summand);
                        value.x *= slope<ACTIVATION>(z.x), value.y *= slope<ACTIVATION>(z.y);
                        unsigned pair = narrow<T>(value.x, value.y);
                        store_shared(at, pair);
                        int pixel = warp_m * SIXTEENS * 16 + local;
                        int h = (place.top + pixel / TILE_W) * STRIDE + which_class / STRIDE;
                        int w = (place.left + pixel % TILE_W) * STRIDE + which_class % STRIDE;
                        if (pixel < PIXELS && h < height && w < columns) {
                            value = widen<T>(pair);
                            product.x += value.x * (raw.x - centre.x) * width.x, plain.x += value.x;
                            product.y += value.y * (raw.y - centre.y) * width.y, plain.y += value.y;
                        }
                    } else {
                        store_shared(at, narrow<T>(value.x, value.y));
                    }
                }
            }
            if constexpr (SUMS) {
                Floats4 total = {product.x, plain.x, product.y, plain.y};
#pragma unroll
                for (int mask = 4; mask < 32; mask *= 2) {
                    total.x += shuffle_xor(total.x, mask), total.y += shuffle_xor(total.y, mask);
                    total.z += shuffle_xor(total.z, mask), total.w += shuffle_xor(total.w, mask);
                }
                if (lane < 4) {
                    unsigned at = column_sums + (warp_m * GROUPS * OUT_TILE + row + n * 8 + lane * 2) * 8;
                    if (which_class) {
                        Floats4 before = load_shared<Floats4>(at);
                        total.x += before.x, total.y += before.y, total.z += before.z, total.w += before.w;
                    }
                    store_shared(at, total);
                }
            }
        }
        sync_warp();
        visit([&](unsigned at, long long to, bool inside) {
            if (inside) store_global(reinterpret_cast<Eight*>(dx + to), load_shared<Eight>(at));
        });
    };

    unsigned pixels[SIXTEENS];
#pragma unroll
    for (int j = 0; j < SIXTEENS; ++j) {
        int pixel = (warp_m * SIXTEENS + j) * 16 + lane % 16;
        if (pixel >= PIXELS) pixel = 0;
        pixels[j] = Halo::offset(pixel / TILE_W, pixel % TILE_W);
    }

    // Rows of the weight's gradient are chunks of (tap, k) in the order of classes, two of one class to a product; this
    // warp's products are warp_m + i WARPS_M.
    constexpr int PRODUCTS = STRIDE == 1 ? ceil_div(DEPTH, 2) : ceil_div(CHUNKS, 2) + 4 * CHUNKS;
    constexpr int MINE = WEIGHT ? ceil_div(PRODUCTS, WARPS_M) : 1;
    auto class_of = [](int product) {
        int from = product - ceil_div(CHUNKS, 2);
        return STRIDE == 1 || from < 0 ? 0 : from < CHUNKS ? 1 : from < 2 * CHUNKS ? 2 : 3;
    };
    auto chunk_of = [&](int product, int half) {  // negative: there is none
        int which = class_of(product);
        int local = product - (which == 0 ? 0 : ceil_div(CHUNKS, 2) + (which - 1) * CHUNKS);
        int chunk = 2 * local + half;
        return product < PRODUCTS && chunk < Class::taps(which) * CHUNKS ? Class::first(which) * CHUNKS + chunk : -1;
    };
    auto offset_of = [](int chunk) {
        int tap = Class::tap(chunk / CHUNKS);
        return Halo::offset(Class::shift(tap / 3), Class::shift(tap % 3)) + chunk % CHUNKS * 16;
    };
    float gradient[MINE][WEIGHT ? UNIT : 1][4] = {};
    unsigned row_offsets[MINE], class_offsets[MINE];
    if constexpr (WEIGHT) {
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            int product = warp_m + i * WARPS_M, chunk = chunk_of(product, lane / 8 % 2), which = class_of(product);
            row_offsets[i] = offset_of(chunk < 0 ? 0 : chunk);
            class_offsets[i] = Inputs::offset(which / STRIDE, which % STRIDE);
        }
    }

    if constexpr (INPUT && RESIDENT) copy_weights(weights, 0);
    for (int step = 0; step < STAGES - 1; ++step) copy_step(step);
    float found[RESIDENT ? 1 : Class::COUNT][SIXTEENS][UNIT][4];
    for (int step = 0; step < steps; ++step) {
        wait_copies<STAGES - 2>();
        make_step(step);
        sync_block();  // this step's pixels are there, and nobody reads those of the step before any more
        copy_step(step + STAGES - 1);
        const unsigned stage = stages + step % STAGES * STAGE_BYTES;
        const Place place = place_of(step);
        if constexpr (INPUT) {
            for (int unit = warp_n; unit < UNITS; unit += WARPS_N) {
                const int which = unit / UNITS_IN_GROUP, row = which * OUT_TILE + unit % UNITS_IN_GROUP * UNIT * 8;
                unsigned from[SIXTEENS];
#pragma unroll
                for (int j = 0; j < SIXTEENS; ++j) from[j] = stage + pixels[j] + which * CHUNKS * 16;
                auto one_class = [&](auto constant) {
                    constexpr int CLASS = decltype(constant)::value, HELD = RESIDENT ? 0 : CLASS;
                    if (step % STEPS == 0) {
#pragma unroll
                        for (int i = 0; i < SIXTEENS * UNIT * 4; ++i) found[HELD][i / 4 / UNIT][i / 4 % UNIT][i % 4] = 0.0f;
                    }
                    auto taps = [&](int k) { return offset_of(Class::first(CLASS) * CHUNKS + k); };
                    multiply<T, Class::taps(CLASS) * CHUNKS, SIXTEENS, UNIT, DEPTH>(
                        found[HELD], from,
                        (RESIDENT ? weights : stage + WEIGHTS_AT) + row * WEIGHT_PITCH + Class::first(CLASS) * CHUNKS * 16,
                        taps);
                    if (step % STEPS == STEPS - 1) finish(found[HELD], place, unit, CLASS);
                };
                one_class(Constant<0>());
                if constexpr (STRIDE == 2) {
                    one_class(Constant<1>());
                    one_class(Constant<2>());
                    one_class(Constant<3>());
                }
            }
        }
        if constexpr (WEIGHT) {
            const int which = warp_n / UNITS_IN_GROUP, part = warp_n % UNITS_IN_GROUP * UNIT;
#pragma unroll 1
            for (int k = 0; k < PIXELS; k += 16) {
                const int p = k + lane / 16 * 8 + lane % 8, r = k + lane / 8 % 2 * 8 + lane % 8;
                const unsigned rows = stage + Halo::offset(p / TILE_W, p % TILE_W) + which * CHUNKS * 16;
                const unsigned outs = stage + INPUTS_AT + Inputs::offset(r / TILE_W * STRIDE, r % TILE_W * STRIDE) +
                                      (which * OUT_TILE / 8 + part + lane / 16) * 16;
                unsigned right[UNIT][2];
#pragma unroll
                for (int i = 0; i < MINE; ++i) {
                    if (i == 0 || STRIDE == 2) {
#pragma unroll
                        for (int n = 0; n + 1 < UNIT; n += 2) {
                            unsigned four[4];
                            load_matrices_transposed(four, outs + class_offsets[i] + n * 16);
                            right[n][0] = four[0], right[n][1] = four[1], right[n + 1][0] = four[2], right[n + 1][1] = four[3];
                        }
                        if constexpr (UNIT % 2) load_matrices_transposed(right[UNIT - 1], outs + class_offsets[i] + (UNIT - 1) * 16);
                    }
                    unsigned left[4];
                    load_matrices_transposed(left, rows + row_offsets[i]);
#pragma unroll
                    for (int n = 0; n < UNIT; ++n) mma_k16<T>(gradient[i][n], left, right[n]);
                }
            }
        }
        if (SUMS && step % STEPS == STEPS - 1) {
            sync_block();
            int tile = block_x() + step / STEPS * grid_x();
            for (int row = thread_x(); row < GROUPS * OUT_TILE; row += THREADS) {
                int which = row / OUT_TILE, n = first_out + row % OUT_TILE;
                if (which >= known_groups || n >= WIDTH) continue;
                Floats2 total = {0.0f, 0.0f};
                for (int m = 0; m < WARPS_M; ++m) {
                    Floats2 two = load_shared<Floats2>(column_sums + (m * GROUPS * OUT_TILE + row) * 8);
                    total.x += two.x, total.y += two.y;
                }
                float* to = sums + (long long)tile * 2 * channels + (group + which) * WIDTH + n;
                store_global(to, total.x);
                store_global(to + channels, total.y);
            }
        }
    }
    wait_copies<0>();
    if constexpr (WEIGHT) {
        const int which = warp_n / UNITS_IN_GROUP, first = first_out + warp_n % UNITS_IN_GROUP * UNIT * 8;
        if (which >= known_groups) return;
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int chunk = chunk_of(warp_m + i * WARPS_M, half);
                if (chunk < 0) continue;
                int tap = Class::tap(chunk / CHUNKS), k = split * CHUNK + chunk % CHUNKS * 8 + lane / 4;
                if (k >= WIDTH) continue;
                long long row = ((long long)block_x() * channels + (group + which) * WIDTH + k) * 9 + tap;
#pragma unroll
                for (int n = 0; n < UNIT; ++n) {
                    int c = first + n * 8 + lane % 4 * 2;
                    if (c < WIDTH)
                        store_global(
                            reinterpret_cast<Floats2*>(parts + row * WIDTH + c),
                            Floats2{gradient[i][n][2 * half], gradient[i][n][2 * half + 1]});
                }
            }
        }
    }
}
