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

constexpr DEVICE int products_of(int chunks, int stride) {
    return stride == 1 ? ceil_div(9 * chunks, 2) : ceil_div(chunks, 2) + 4 * chunks;
}

// With many sums in registers, those of a thread are not held to what three blocks of four warps leave.
template <
    class T, int WIDTH, int GROUPS, int CHUNK, int OUT_TILE, int UNIT, int STRIDE, int TILE_H, int TILE_W, int WARPS_M,
    int WARPS_N, int STAGES, bool INPUT, bool WEIGHT, int AFFINE, bool NORM, bool SUMS, int ACTIVATION>
KERNEL(
    32 * WARPS_M * WARPS_N,
    (WEIGHT ? ceil_div(products_of(CHUNK / 8, STRIDE), WARPS_M) * UNIT : 0) > 12 ? 1 : 65536 / (168 * 32 * WARPS_M * WARPS_N))
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
    static_assert(UNITS == WARPS_N, "one unit for each warp");
    static_assert(!(INPUT && WEIGHT) || SPLITS == 1, "a single pass only of whole groups");

    using Halo = Tile<TILE_H + HALO, TILE_W + HALO, GROUPS * CHUNKS>;
    using Inputs = Tile<TILE_H * STRIDE, TILE_W * STRIDE, GROUPS * OUT_TILE / 8, STRIDE == 2>;
    constexpr int WEIGHT_PITCH = odd_pitch(DEPTH), WEIGHT_BYTES = INPUT ? GROUPS * OUT_TILE * WEIGHT_PITCH : 0;
    using Copies = Share<Halo, HALO / 2, THREADS, false>;
    using Reads = Share<Inputs, 0, THREADS, false>;
    constexpr int INPUTS_AT = (AFFINE == 2 ? 2 : 1) * Halo::BYTES;
    constexpr int WEIGHTS_AT = INPUTS_AT + (WEIGHT ? Inputs::BYTES : 0);
    constexpr int STAGE_BYTES = WEIGHTS_AT + (RESIDENT ? 0 : WEIGHT_BYTES);
    constexpr int RESULT_PITCH = odd_pitch(UNIT), RESULT_BYTES = INPUT ? SIXTEENS * 16 * RESULT_PITCH : 0;
    constexpr int RESULTS = ceil_div(RESULT_BYTES, 16 * 32), ROWS = GROUPS * OUT_TILE;
    const unsigned stages = shared_base(), weights = stages + STAGES * STAGE_BYTES;
    const unsigned results = weights + (RESIDENT ? WEIGHT_BYTES : 0);
    const unsigned column_sums = results + WARPS_M * WARPS_N * RESULT_BYTES;

    const int lane = thread_x() % 32, warp = thread_x() / 32, warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
    const int channels = groups * WIDTH, down = ceil_div(out_height, TILE_H), across = ceil_div(out_columns, TILE_W);
    const int split = INPUT ? 0 : block_y() % SPLITS, slab = INPUT ? block_y() : block_y() / SPLITS;
    const int group = slab / OUT_TILES * GROUPS, first_out = slab % OUT_TILES * OUT_TILE;
    const int known_groups = GROUPS > 1 && groups - group < GROUPS ? groups - group : GROUPS;
    const int left = GROUPS > 1 ? known_groups * WIDTH : WIDTH - first_out;
    const int known_rows = (GROUPS > 1 || WIDTH % OUT_TILE) && left < ROWS ? left : ROWS;
    const unsigned first_channel = group * WIDTH + first_out;  // extended to 64 bits for nothing
    Walk tile(images, down, across);
    const int first_tile = tile.first, steps = tile.count * STEPS;
    const int last_rows = out_height - (down - 1) * TILE_H, last_columns = out_columns - (across - 1) * TILE_W;
    const int last_in_rows = height - (down - 1) * TILE_H * STRIDE;
    const int last_in_columns = columns - (across - 1) * TILE_W * STRIDE;
    const unsigned result = results + warp * RESULT_BYTES;
    // The warp's unit: its group of the slab, its first row, and how many of its eights there are.
    const int which = warp_n / UNITS_IN_GROUP, own_row = which * OUT_TILE + warp_n % UNITS_IN_GROUP * UNIT * 8;
    const int eights = known_rows - own_row < UNIT * 8 ? (known_rows - own_row) / 8 : UNIT;
    const unsigned out = first_channel + own_row;

    // The order of a sum's terms: by classes of taps, or without them as in the forward kernel.
    auto tap_of = [](int k) { return STRIDE == 1 ? Terms<CHUNKS>::tap(k) : Class::tap(k / CHUNKS); };
    auto chunk_of_term = [](int k) { return STRIDE == 1 ? Terms<CHUNKS>::chunk(k) : k % CHUNKS; };
    const int term = thread_x() % DEPTH;
    const WeightShare<ROWS, DEPTH, WIDTH, THREADS, !RESIDENT> weight_copies(
        first_channel, known_rows, tap_of(term), chunk_of_term(term) * 8);
    const Copies copies(out_columns, channels, SPLITS == 1 ? known_groups * CHUNKS : CHUNKS, last_rows, last_columns);
    const unsigned last_chunks = Copies::chunks(WIDTH % CHUNK / 8);
    const Reads reads(columns, channels, known_rows / 8, last_in_rows, last_in_columns);
    // A lane's i-th chunk of results: its pixel of the tile and its place among the unit's eights.
    struct Result {
        int pixel, n;
    };
    auto result_of = [&](int lane, int i) {
        int at = lane + i * 32;
        return Result{warp_m * SIXTEENS * 16 + at / (RESULT_PITCH / 16), at % (RESULT_PITCH / 16)};
    };
    auto bytes_to = [&](Result result) {
        int row = result.pixel / TILE_W * STRIDE, column = result.pixel % TILE_W * STRIDE;
        return ((row * columns + column) * channels + result.n * 8) * 2u;
    };
    // Those that there are and, as bits from RESULTS on, the lane's rows of sums; by the remainder of row and column.
    Edges<RESULTS + 2 * SIXTEENS> own[STRIDE];
    auto add = [&](int i, bool known, int pixel) {
#pragma unroll
        for (int r = 0; r < STRIDE; ++r)
            own[r].add(
                i, known && pixel < PIXELS, pixel / TILE_W * STRIDE + r, pixel % TILE_W * STRIDE + r, last_in_rows,
                last_in_columns);
    };
#pragma unroll
    for (int i = 0; i < RESULTS; ++i) {
        const Result result = result_of(lane, i);
        add(i, lane + i * 32 < RESULT_BYTES / 16 && result.n < eights, result.pixel);
    }
#pragma unroll
    for (int i = 0; i < 2 * SIXTEENS; ++i) add(RESULTS + i, true, warp_m * SIXTEENS * 16 + i * 8 + lane / 4);
    // What a step, a tile or CHUNK of its channels, has still to know when its pixels are there.
    struct Step {
        int channel, pixel;  // of the tile's first one in x
        unsigned edges;      // of the image, that the tile is at: above, below, left, right
    };
    Step next[STAGES - 1];
    int channel_ahead = INPUT ? 0 : split * CHUNK;
    unsigned stage = stages;
    auto after = [&](unsigned stage) { return stage + STAGE_BYTES == weights ? stages : stage + STAGE_BYTES; };
    auto copied_of = [&](unsigned edges, int channel) {
        return copies.edges.inside(edges) & (WIDTH % CHUNK && channel + CHUNK > WIDTH ? last_chunks : ~0u);
    };
    auto copy_step = [&](unsigned stage, bool any) {
        if (any) {
            const int top = tile.row * TILE_H, left = tile.column * TILE_W;
            const int from = (tile.image * out_height + top - HALO / 2) * out_columns + left - HALO / 2;
            const int pixel = (tile.image * height + top * STRIDE) * columns + left * STRIDE;
            const long long base = (long long)from * channels + group * WIDTH + channel_ahead;
            const unsigned edges = tile.edges();
            const unsigned copied = copied_of(edges, channel_ahead);
            copies.copy(stage, dz + base, copied);
            if constexpr (AFFINE == 2) copies.copy(stage + Halo::BYTES, y + base, copied);
            if constexpr (WEIGHT)
                reads.copy(stage + INPUTS_AT, x + (long long)pixel * channels + first_channel, reads.edges.inside(edges));
            if constexpr (!RESIDENT) weight_copies.copy(stage + WEIGHTS_AT, weight, channel_ahead);
            next[STAGES - 2] = {channel_ahead, pixel, edges};
            if (STEPS > 1) channel_ahead += CHUNK;
            if (STEPS == 1 || channel_ahead >= WIDTH) {
                if (STEPS > 1) channel_ahead = 0;
                tile.advance();
            }
        }
        commit_copies();
    };
    // Each thread makes dy and read(x) of the chunks that it copied itself, but for what is outside and stays zero.
    auto make_step = [&](const Step& now) {
        if constexpr (AFFINE != 0) {
            Copies::visit(stage, copied_of(now.edges, now.channel), [&](int chunk, unsigned at) {
                const int first = group * WIDTH + now.channel + chunk * 8;
                const Pairs factor(a, first), of_raw(AFFINE == 2 ? q : a, first), summand(AFFINE == 2 ? b : a, first);
                Eight value = load_shared<Eight>(at), raw = {};
                if constexpr (AFFINE == 2) raw = load_shared<Eight>(at + Halo::BYTES);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    Floats2 constant = {0.0f, 0.0f};
                    if constexpr (AFFINE == 2) constant = affine(widen<T>(raw.pair[i]), of_raw.of[i], summand.of[i]);
                    Floats2 made = affine(widen<T>(value.pair[i]), factor.of[i], constant);
                    value.pair[i] = narrow<T>(made.x, made.y);
                }
                store_shared(at, value);
            });
        }
        if constexpr (WEIGHT && NORM) {
            Reads::visit(stage + INPUTS_AT, reads.edges.inside(now.edges), [&](int chunk, unsigned at) {
                read_through<T, ACTIVATION>(at, scale, shift, first_channel + chunk * 8);
            });
        }
    };

    // One class's sums to memory: the warp's pixels and its unit of channels.
    auto finish = [&](const float (&found)[SIXTEENS][UNIT][4], const Step& now, int which_class) {
        const int first_row = which_class / STRIDE, first_column = which_class % STRIDE;
        const long long first = (long long)(now.pixel + first_row * columns + first_column) * channels + out;
        const unsigned inside = own[first_row].inside(now.edges & 3) & own[first_column].inside(now.edges & 12);
        const int here = forget(lane);
        sync_warp();  // the last results have left
        if constexpr (SUMS) {
            const char* from = reinterpret_cast<const char*>(x + first);
#pragma unroll
            for (int i = 0; i < RESULTS; ++i) {
                Eight raw = {};
                const char* at = from + bytes_to(result_of(here, i));
                if (inside >> i & 1) raw = load_global(reinterpret_cast<const Eight*>(at));
                if ((i + 1) * 32 * 16 <= RESULT_BYTES || (lane + i * 32) * 16 < RESULT_BYTES)
                    store_shared(result + (lane + i * 32) * 16, raw);
            }
            sync_warp();
        }
#pragma unroll
        for (int n = 0; n < UNIT; ++n) {

            const unsigned channel = out + n * 8 + here % 4 * 2;
            Floats2 factor = {}, summand = {}, centre = {}, width = {}, product = {}, plain = {};
            if (SUMS && n < eights) {
                factor = load_two(scale, channel), summand = load_two(shift, channel);
                centre = load_two(mean, channel), width = load_two(invstd, channel);
            }
#pragma unroll
            for (int i = 0; i < 2 * SIXTEENS; ++i) {
                const unsigned at = result + (i * 8 + lane / 4) * RESULT_PITCH + n * 16 + lane % 4 * 4;
                Floats2 value = {found[i / 2][n][i % 2 * 2], found[i / 2][n][i % 2 * 2 + 1]};
                if constexpr (SUMS) {
                    hold_loads();
                    Floats2 raw = widen<T>(load_shared<unsigned>(at)), z = affine(raw, factor, summand);
                    value.x *= slope<ACTIVATION>(z.x), value.y *= slope<ACTIVATION>(z.y);
                    unsigned pair = narrow<T>(value.x, value.y);
                    store_shared(at, pair);
                    if (inside >> (RESULTS + i) & 1) {
                        value = widen<T>(pair);
                        product.x += value.x * (raw.x - centre.x) * width.x, plain.x += value.x;
                        product.y += value.y * (raw.y - centre.y) * width.y, plain.y += value.y;
                    }
                } else {
                    store_shared(at, narrow<T>(value.x, value.y));
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
                    unsigned at = column_sums + (warp_m * ROWS + own_row + n * 8 + lane * 2) * 8;
                    if (which_class) {
                        Floats4 before = load_shared<Floats4>(at);
                        total.x += before.x, total.y += before.y, total.z += before.z, total.w += before.w;
                    }
                    store_shared(at, total);
                }
            }
        }
        sync_warp();
        char* to_dx = reinterpret_cast<char*>(dx + first);
#pragma unroll
        for (int i = 0; i < RESULTS; ++i) {
            char* to = to_dx + bytes_to(result_of(here, i));
            if (inside >> i & 1)
                store_global(reinterpret_cast<Eight*>(to), load_shared<Eight>(result + (lane + i * 32) * 16));
        }
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
    constexpr int PRODUCTS = products_of(CHUNKS, STRIDE);
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
    // Where lane's pixel of sixteen is: the next sixteen's is 16 further, in a row of TILE_W.
    struct Pixel {
        int column;
        unsigned offset;

        DEVICE void advance(int pitch, int row_pitch) {
            column += 16 % TILE_W, offset += 16 / TILE_W * row_pitch + 16 % TILE_W * pitch;
            if (16 % TILE_W && column >= TILE_W) column -= TILE_W, offset += row_pitch - TILE_W * pitch;
        }
    };
    constexpr int HALO_ROW = Halo::offset(1, 0), INPUT_ROW = Inputs::offset(STRIDE, 0);

    if constexpr (INPUT && RESIDENT) weight_copies.copy(weights, weight, 0);
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (STAGES == 3) next[0] = next[STAGES - 2];
        copy_step(stages + step * STAGE_BYTES, step < steps);
    }
    float found[RESIDENT ? 1 : Class::COUNT][SIXTEENS][UNIT][4];
    for (int step = 0; step < steps; ++step, stage = after(stage)) {
        const Step now = next[0];
        wait_copies<STAGES - 2>();
        make_step(now);
        sync_block();  // this step's pixels are there, and nobody reads those of the step before any more
        if (STAGES == 3) next[0] = next[STAGES - 2];
        copy_step(STAGES == 3 ? after(after(stage)) : after(stage), step + STAGES - 1 < steps);
        const bool last = STEPS == 1 || now.channel + CHUNK >= WIDTH;
        if (INPUT && which < known_groups) {
            unsigned from[SIXTEENS];
#pragma unroll
            for (int j = 0; j < SIXTEENS; ++j) from[j] = stage + pixels[j] + which * CHUNKS * 16;
            auto one_class = [&](auto constant) {
                constexpr int CLASS = decltype(constant)::value, HELD = RESIDENT ? 0 : CLASS;
                if (RESIDENT || now.channel == 0) {
#pragma unroll
                    for (int i = 0; i < SIXTEENS * UNIT * 4; ++i) found[HELD][i / 4 / UNIT][i / 4 % UNIT][i % 4] = 0.0f;
                }
                auto taps = [&](int k) {
                    int term = Class::first(CLASS) * CHUNKS + k, tap = tap_of(term);
                    return Halo::offset(Class::shift(tap / 3), Class::shift(tap % 3)) + chunk_of_term(term) * 16;
                };
                multiply<T, Class::taps(CLASS) * CHUNKS, SIXTEENS, UNIT, DEPTH>(
                    found[HELD], from,
                    (RESIDENT ? weights : stage + WEIGHTS_AT) + own_row * WEIGHT_PITCH + Class::first(CLASS) * CHUNKS * 16,
                    taps);
                if (last) finish(found[HELD], now, CLASS);
            };
            one_class(Constant<0>());
            if constexpr (STRIDE == 2) {
                one_class(Constant<1>());
                one_class(Constant<2>());
                one_class(Constant<3>());
            }
        }
        if constexpr (WEIGHT) {
            const int here = forget(lane), part = warp_n % UNITS_IN_GROUP * UNIT;
            const int p = here / 16 * 8 + here % 8, r = here / 8 % 2 * 8 + here % 8;
            unsigned row_offsets[MINE], class_offsets[MINE];
#pragma unroll
            for (int i = 0; i < MINE; ++i) {
                int product = warp_m + i * WARPS_M, chunk = chunk_of(product, here / 8 % 2), which_class = class_of(product);
                row_offsets[i] = offset_of(chunk < 0 ? 0 : chunk);
                class_offsets[i] = Inputs::offset(which_class / STRIDE, which_class % STRIDE);
            }
            Pixel left_at = {p % TILE_W, stage + Halo::offset(p / TILE_W, p % TILE_W) + which * CHUNKS * 16};
            Pixel right_at = {
                r % TILE_W, stage + INPUTS_AT + Inputs::offset(r / TILE_W * STRIDE, r % TILE_W * STRIDE) +
                                (which * OUT_TILE / 8 + part + here / 16) * 16};
#pragma unroll 1
            for (int k = 0; k < PIXELS; k += 16) {
                unsigned right[UNIT][2];
#pragma unroll
                for (int i = 0; i < MINE; ++i) {
                    if (i == 0 || STRIDE == 2) {
                        const unsigned outs = right_at.offset + class_offsets[i];
#pragma unroll
                        for (int n = 0; n + 1 < UNIT; n += 2) {
                            unsigned four[4];
                            load_matrices_transposed(four, outs + n * 16);
                            right[n][0] = four[0], right[n][1] = four[1], right[n + 1][0] = four[2], right[n + 1][1] = four[3];
                        }
                        if constexpr (UNIT % 2) load_matrices_transposed(right[UNIT - 1], outs + (UNIT - 1) * 16);
                    }
                    unsigned left[4];
                    load_matrices_transposed(left, left_at.offset + row_offsets[i]);
#pragma unroll
                    for (int n = 0; n < UNIT; ++n) mma_k16<T>(gradient[i][n], left, right[n]);
                }
                left_at.advance(Halo::PITCH, HALO_ROW);
                right_at.advance(Inputs::PITCH, INPUT_ROW);
            }
        }
        if (SUMS && last) {
            sync_block();  // the warps' sums are there
            float* to = sums + (long long)(first_tile + step / STEPS) * 2 * channels + first_channel;
            for (int row = thread_x(); row < known_rows; row += THREADS) {
                Floats2 total = {0.0f, 0.0f};
#pragma unroll
                for (int m = 0; m < WARPS_M; ++m) {
                    Floats2 two = load_shared<Floats2>(column_sums + (m * ROWS + row) * 8);
                    total.x += two.x, total.y += two.y;
                }
                store_global(to + row, total.x);
                store_global(to + channels + row, total.y);
            }
        }
    }
    wait_copies<0>();
    if constexpr (WEIGHT) {
        const int first = first_out + warp_n % UNITS_IN_GROUP * UNIT * 8;
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
