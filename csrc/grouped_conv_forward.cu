// Grouped 3x3 convolution, padding 1, stride 1 or 2, with bias, activation and sums over pixels:
//
//     y[p, g, n] = activation(sum_(tap, c) read(x)[STRIDE p + tap - 1, g, c] * weight[g, n, tap, c] + bias[g, n])
//     read(x) = read_activation(x * scale + shift)             with NORM; else x. Zero outside the image
//     read(x)[p, k] = read_activation(sum_c x[p, c] * in_weight[k, c] + in_bias[k])     with IN: a 1x1 convolution
//     parts[tile, g, n] = sum of y over the tile's pixels / pixels of an image
//     moments[worker, :, g, n] = count, mean and centred sum of squares of y over the worker's tiles
//
//   x (images, height, columns, groups * WIDTH; with IN, 8 IN channels), y (images, out_height, out_columns, groups *
//   WIDTH): T
//   in_weight (groups * WIDTH, 8 IN): T, in_bias (groups * WIDTH) or null: float, with IN
//   weight (groups * WIDTH, 9 * WIDTH), tap by tap: T; bias (groups * WIDTH) or null: float
//   scale, shift (groups * WIDTH): float, with NORM
//   parts (images * tiles of an image, groups * WIDTH): float, with PARTS
//   moments (workers, 3, groups * WIDTH): float, with MOMENTS. Both are of y as it is rounded
//
// A block walks over its share of the tiles of TILE_H x TILE_W output pixels, of one slab, block_y(): GROUPS groups with
// all their channels, whose weights stay in shared memory (CHUNK == WIDTH); or OUT_TILE output channels of a wide group,
// whose input channels come CHUNK at a time together with their weights. The input's tile with its halo is read once for
// all nine taps, STAGES steps ahead. What is the same for all tiles, a thread's places in memory and what of them the
// tiles at the edges have, is found before the first. The sum runs over (tap, chunk of eight channels) as one index, so
// that any multiple of eight fills the matrix instruction. Warps: WARPS_M over pixels, WARPS_N over units of UNIT times
// eight output channels.
//
// With IN the map between the two convolutions is never in memory: a block makes the tile of it, with its halo and for
// the channels of its slab alone, from the tile of x, whose chunks it has all, and rounds it as if it had been written.
#include "grouped_conv.cuh"
#include "moments.cuh"

template <
    class T, int WIDTH, int GROUPS, int CHUNK, int OUT_TILE, int UNIT, int STRIDE, int TILE_H, int TILE_W, int WARPS_M,
    int WARPS_N, int STAGES, int ACTIVATION, bool PARTS, bool NORM, int READ_ACTIVATION, bool MOMENTS, int IN>
KERNEL(32 * WARPS_M * WARPS_N, IN && WARPS_M * WARPS_N <= 4 ? 2 : 65536 / (168 * 32 * WARPS_M * WARPS_N))
grouped_conv_forward(
    const T* x, const float* scale, const float* shift, const T* in_weight, const float* in_bias, const T* weight,
    const float* bias, T* y, float* parts, float* moments, int images, int height, int columns, int out_height,
    int out_columns, int groups) {
    constexpr int THREADS = 32 * WARPS_M * WARPS_N, PIXELS = TILE_H * TILE_W;
    constexpr int SIXTEENS = ceil_div(PIXELS, 16 * WARPS_M), UNITS_IN_GROUP = OUT_TILE / (8 * UNIT);
    constexpr int UNITS = GROUPS * UNITS_IN_GROUP, STEPS = ceil_div(WIDTH, CHUNK), OUT_TILES = ceil_div(WIDTH, OUT_TILE);
    constexpr int CHUNKS = CHUNK / 8, DEPTH = 9 * CHUNKS;
    constexpr bool RESIDENT = STEPS == 1, ONE_UNIT = UNITS == WARPS_N;
    static_assert(CHUNK % 8 == 0 && OUT_TILE % (8 * UNIT) == 0, "channels in eights");
    static_assert(GROUPS == 1 || (RESIDENT && OUT_TILE == WIDTH), "several groups only as a whole");
    static_assert(ONE_UNIT || (RESIDENT && OUT_TILE == WIDTH), "several units for a warp only of whole groups");
    static_assert(!(PARTS && MOMENTS), "one kind of sums");
    static_assert(IN == 0 || (RESIDENT && !NORM), "a convolution before whole groups");

    using Halo = Tile<(TILE_H - 1) * STRIDE + 3, (TILE_W - 1) * STRIDE + 3, GROUPS * CHUNKS, STRIDE == 2>;
    using Source = Tile<Halo::HEIGHT, Halo::WIDTH, IN ? IN : GROUPS * CHUNKS, STRIDE == 2>;
    using Copies = Share<Source, 1, THREADS, true>;
    constexpr int WEIGHT_PITCH = odd_pitch(DEPTH), WEIGHT_BYTES = GROUPS * OUT_TILE * WEIGHT_PITCH;
    constexpr int STAGE_BYTES = Source::BYTES + (RESIDENT ? 0 : WEIGHT_BYTES);
    constexpr int RESULT_PITCH = odd_pitch(UNIT), RESULT_BYTES = SIXTEENS * 16 * RESULT_PITCH;
    constexpr int RESULTS = ceil_div(RESULT_BYTES, 16 * 32);
    constexpr int ROWS = GROUPS * OUT_TILE, ROWS_OF_THREAD = ceil_div(ROWS, THREADS);
    // Of the map behind a convolution in front a warp makes MADE_EIGHTS for AT_ONCE pixels in each of its PASSES.
    constexpr int MADE_EIGHTS = ceil_div(ROWS / 8, WARPS_N), IN_ROWS = MADE_EIGHTS * WARPS_N * 8;
    constexpr int IN_WEIGHT_BYTES = IN ? IN_ROWS * odd_pitch(IN) : 0, BY_TWO = ceil_div(Halo::PIXELS, 32 * WARPS_M);
    constexpr int AT_ONCE = MADE_EIGHTS > 3 ? 16 : BY_TWO % 2 == 0 ? 64 : 32;
    constexpr int PASSES = IN ? ceil_div(Halo::PIXELS, AT_ONCE * WARPS_M) : 0;
    const unsigned stages = shared_base(), weights = stages + STAGES * STAGE_BYTES;
    const unsigned in_weights = weights + (RESIDENT ? WEIGHT_BYTES : 0), made = in_weights + IN_WEIGHT_BYTES;
    const unsigned results = made + (IN ? Halo::BYTES : 0);
    const unsigned column_sums = results + WARPS_M * WARPS_N * RESULT_BYTES;
    const unsigned counts = column_sums + WARPS_M * ROWS * 8;  // of the pixels of each warp's rows

    const int lane = thread_x() % 32, warp = thread_x() / 32, warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
    const int channels = groups * WIDTH, down = ceil_div(out_height, TILE_H), across = ceil_div(out_columns, TILE_W);
    const int group = block_y() / OUT_TILES * GROUPS, first_out = block_y() % OUT_TILES * OUT_TILE;
    const int known_groups = GROUPS > 1 && groups - group < GROUPS ? groups - group : GROUPS;
    const int left = GROUPS > 1 ? known_groups * WIDTH : WIDTH - first_out;
    const int known_rows = (GROUPS > 1 || WIDTH % OUT_TILE) && left < ROWS ? left : ROWS;
    const unsigned first_in = group * WIDTH, first_channel = first_in + first_out;  // extended to 64 bits for nothing
    Walk tile(images, down, across);
    const int first_tile = tile.first, steps = tile.count * STEPS;
    const int last_rows = out_height - (down - 1) * TILE_H, last_columns = out_columns - (across - 1) * TILE_W;
    const unsigned result = results + warp * RESULT_BYTES;

    const int term = thread_x() % DEPTH;
    const WeightShare<ROWS, DEPTH, WIDTH, THREADS, !RESIDENT> weight_copies(
        first_channel, known_rows, Terms<CHUNKS>::tap(term), Terms<CHUNKS>::chunk(term) * 8);
    const int in_channels = IN ? IN * 8 : channels, in_last_rows = height - (down - 1) * TILE_H * STRIDE;
    const int in_last_columns = columns - (across - 1) * TILE_W * STRIDE;
    const Copies copies(
        columns, in_channels, IN ? IN : RESIDENT ? known_groups * CHUNKS : CHUNKS, in_last_rows, in_last_columns);
    const unsigned last_chunks = Copies::chunks(WIDTH % CHUNK / 8);
    struct Result {
        int pixel, n;  // of the tile, of the unit's eights
    };
    // Of a warp with one unit: its first row of the slab's, and how many of its eights there are.
    const int own_row = warp_n / UNITS_IN_GROUP * OUT_TILE + warp_n % UNITS_IN_GROUP * UNIT * 8;
    const int eights = ONE_UNIT && known_rows - own_row < UNIT * 8 ? (known_rows - own_row) / 8 : UNIT;
    // This lane's chunks of results and, as bits from RESULTS on, its rows of sums. Wide groups, which store once in many
    // steps, find places again: their sums need the registers.
    auto result_of = [&](int lane, int i) {
        int at = lane + i * 32, local = at / (RESULT_PITCH / 16), pixel = warp_m * SIXTEENS * 16 + local;
        return Result{at < RESULT_BYTES / 16 ? pixel : PIXELS, at % (RESULT_PITCH / 16)};
    };
    auto bytes_to = [&](Result result) {
        int row = result.pixel / TILE_W, column = result.pixel % TILE_W;
        return ((row * out_columns + column) * channels + result.n * 8) * 2u;
    };
    unsigned to[RESULTS];
    Edges<RESULTS + 2 * SIXTEENS> own;
#pragma unroll
    for (int i = 0; i < RESULTS; ++i) {
        const Result result = result_of(lane, i);
        if (RESIDENT) to[i] = bytes_to(result);
        own.add(
            i, result.pixel < PIXELS && result.n < eights, result.pixel / TILE_W, result.pixel % TILE_W, last_rows,
            last_columns);
    }
#pragma unroll
    for (int i = 0; i < 2 * SIXTEENS; ++i) {
        int pixel = warp_m * SIXTEENS * 16 + i * 8 + lane / 4;
        own.add(RESULTS + i, pixel < PIXELS, pixel / TILE_W, pixel % TILE_W, last_rows, last_columns);
    }
    // With IN: which of this lane's pixels of the map between the convolutions are in the image.
    Edges<IN ? PASSES * AT_ONCE / 8 : 1> own_made;
#pragma unroll
    for (int i = 0; i < PASSES * AT_ONCE / 8; ++i) {
        int pass = i / (AT_ONCE / 8), place = (pass * WARPS_M + warp_m) * AT_ONCE + i % (AT_ONCE / 8) * 8 + lane / 4;
        int row = Halo::row(place) - 1, column = Halo::column(place) - 1;
        own_made.add(i, place < Halo::PIXELS, row, column, in_last_rows, in_last_columns);
    }
    // What a step, a tile or with wide groups CHUNK of its channels, has still to know when its pixels are there.
    struct Step {
        int channel, pixel;  // of the tile's first one in y
        unsigned copied, own;
    };
    Step next[STAGES - 1];
    int channel_ahead = 0;
    unsigned stage = stages;
    auto after = [&](unsigned stage) { return stage + STAGE_BYTES == weights ? stages : stage + STAGE_BYTES; };
    auto copy_step = [&](unsigned stage, bool any) {
        if (any) {
            const int top = tile.row * TILE_H, left = tile.column * TILE_W;
            const int pixel = (tile.image * height + top * STRIDE - 1) * columns + left * STRIDE - 1;
            unsigned inside = copies.edges.inside(tile);
            if (WIDTH % CHUNK && channel_ahead + CHUNK > WIDTH) inside &= last_chunks;
            copies.copy(stage, x + (long long)pixel * in_channels + (IN ? 0 : first_in + channel_ahead), inside);
            if constexpr (IN > 0) inside = own_made.inside(tile);
            if constexpr (!RESIDENT) weight_copies.copy(stage + Source::BYTES, weight, channel_ahead);
            next[STAGES - 2] = {
                channel_ahead, (tile.image * out_height + top) * out_columns + left, inside, own.inside(tile)};
            channel_ahead += CHUNK;
            if (channel_ahead >= WIDTH) channel_ahead = 0, tile.advance();
        }
        commit_copies();
    };
    // Sums over the warp's rows, of the columns that lanes of the same remainder by four share.
    auto over_rows = [](Floats2 sum) {
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) {
            sum.x += shuffle_xor(sum.x, mask);
            sum.y += shuffle_xor(sum.y, mask);
        }
        return sum;
    };

    unsigned pixels[SIXTEENS];
#pragma unroll
    for (int j = 0; j < SIXTEENS; ++j) {
        int pixel = (warp_m * SIXTEENS + j) * 16 + lane % 16;
        if (pixel >= PIXELS) pixel = 0;
        pixels[j] = Halo::offset(pixel / TILE_W * STRIDE, pixel % TILE_W * STRIDE);
    }
    auto taps = [](int k) {
        return Halo::offset(Terms<CHUNKS>::tap(k) / 3, Terms<CHUNKS>::tap(k) % 3) + Terms<CHUNKS>::chunk(k) * 16;
    };
    Floats2 start[UNIT];
    auto load_bias = [&](unsigned out) {
#pragma unroll
        for (int n = 0; n < UNIT; ++n)
            start[n] = bias && n < eights ? load_two(bias, int(out) + n * 8 + lane % 4 * 2) : Floats2{0.0f, 0.0f};
    };

    float sums[SIXTEENS][UNIT][4];
    auto begin = [&](unsigned out) {
        if constexpr (!(RESIDENT && ONE_UNIT)) load_bias(out);
#pragma unroll
        for (int i = 0; i < SIXTEENS * UNIT * 4; ++i) {
            const Floats2 of = start[i / 4 % UNIT];
            sums[i / 4 / UNIT][i / 4 % UNIT][i % 4] = i % 2 ? of.y : of.x;
        }
    };

    // The slab's channels of the map behind a convolution in front, from a tile of x.
    auto make = [&](unsigned stage, unsigned inside) {
        if constexpr (IN > 0) {
            // Found again for each tile: what it needs would take the registers of what is held.
            const int lane = forget(thread_x()) % 32, first = warp_n * MADE_EIGHTS * 8;
#pragma unroll 1
            for (int place = warp_m * AT_ONCE; place < Halo::PIXELS; place += AT_ONCE * WARPS_M) {
                unsigned from[AT_ONCE / 16];
#pragma unroll
                for (int j = 0; j < AT_ONCE / 16; ++j) {
                    int pixel = place + j * 16 + lane % 16;
                    from[j] = stage + (pixel < Halo::PIXELS ? pixel : 0) * Source::PITCH;
                }
                float values[AT_ONCE / 16][MADE_EIGHTS][4];
#pragma unroll
                for (int n = 0; n < MADE_EIGHTS; ++n) {
                    const int row = first + n * 8;
                    Floats2 of = {0.0f, 0.0f};
                    if (in_bias && row < known_rows) of = load_two(in_bias, int(first_channel) + row + lane % 4 * 2);
#pragma unroll
                    for (int i = 0; i < AT_ONCE / 4; ++i) values[i / 4][n][i % 4] = i % 2 ? of.y : of.x;
                }
                multiply<T, IN, AT_ONCE / 16, MADE_EIGHTS, IN>(
                    values, from, in_weights + first * odd_pitch(IN), [](int k) { return k * 16; });
#pragma unroll
                for (int i = 0; i < AT_ONCE / 8; ++i, inside >>= 1) {
                    const int pixel = place + i * 8 + lane / 4;
                    if (pixel >= Halo::PIXELS) continue;
#pragma unroll
                    for (int n = 0; n < MADE_EIGHTS; ++n) {
                        if (IN_ROWS > ROWS && first + n * 8 >= ROWS) continue;
                        const float* two = &values[i / 2][n][i % 2 * 2];
                        unsigned pair = inside & 1 ? narrow_activated<T, READ_ACTIVATION>(two[0], two[1]) : 0;
                        store_shared(made + pixel * Halo::PITCH + first * 2 + n * 16 + lane % 4 * 4, pair);
                    }
                }
            }
            sync_block();  // the whole tile is made
        }
    };

    if constexpr (RESIDENT) weight_copies.copy(weights, weight, 0);
    for (int at = thread_x(); at < IN_ROWS * IN; at += THREADS) {
        const int row = at / (IN ? IN : 1), chunk = at % (IN ? IN : 1);
        copy_async(
            in_weights + row * odd_pitch(IN) + chunk * 16,
            in_weight + ((long long)(first_channel + row) * IN + chunk) * 8, row < known_rows);
    }
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (STAGES == 3) next[0] = next[STAGES - 2];
        copy_step(stages + step * STAGE_BYTES, step < steps);
    }
    if constexpr (RESIDENT && ONE_UNIT) load_bias(first_channel + own_row);
    if constexpr (!RESIDENT) begin(first_channel + own_row);
    Moments found[ROWS_OF_THREAD] = {};
    const float pixel_share = 1.0f / (out_height * out_columns);
    for (int step = 0; step < steps; ++step, stage = after(stage)) {
        const Step now = next[0];
        wait_copies<STAGES - 2>();
        if constexpr (NORM) {
            // Each thread makes read(x) of the chunks that it copied itself, but for what is outside and stays zero.
            Copies::visit(stage, now.copied, [&](int chunk, unsigned at) {
                read_through<T, READ_ACTIVATION>(at, scale, shift, group * WIDTH + now.channel + chunk * 8);
            });
        }
        sync_block();  // this step's pixels are there, and nobody reads those of the step before any more
        if (STAGES == 3) next[0] = next[STAGES - 2];
        copy_step(STAGES == 3 ? after(after(stage)) : after(stage), step + STAGES - 1 < steps);
        if constexpr (IN > 0) make(stage, now.copied);
        const unsigned map = IN ? made : stage;
        const bool last = now.channel + CHUNK >= WIDTH;
        const unsigned to_sum = now.own >> RESULTS;
        auto compute = [&](int unit) {
            const int which = unit / UNITS_IN_GROUP, row = which * OUT_TILE + unit % UNITS_IN_GROUP * UNIT * 8;
            const unsigned out = first_channel + row;
            if constexpr (RESIDENT) begin(out);
            unsigned from[SIXTEENS];
#pragma unroll
            for (int j = 0; j < SIXTEENS; ++j) from[j] = map + pixels[j] + which * CHUNKS * 16;
            multiply<T, DEPTH, SIXTEENS, UNIT, DEPTH>(
                sums, from, (RESIDENT ? weights : stage + Source::BYTES) + row * WEIGHT_PITCH, taps);
            if (!last) return;

            float share = 0.0f;  // 1 / the pixels of the warp's rows
            if constexpr (MOMENTS) {
                float count = count_bits(to_sum);
#pragma unroll
                for (int mask = 4; mask < 32; mask *= 2) count += shuffle_xor(count, mask);
                if (count > 0.0f) share = 1.0f / count;
                if (warp_n == 0 && lane == 0) store_shared(counts + warp_m * 4, count);
            }
            const unsigned to_sums = column_sums + (warp_m * ROWS + row + lane * 2) * (MOMENTS ? 8 : 4);
            Floats2 totals[UNIT] = {};
            sync_warp();  // the last results have left
#pragma unroll
            for (int i = 0; i < 2 * SIXTEENS; ++i) {
#pragma unroll
                for (int n = 0; n < UNIT; ++n) {
                    const float *low = &sums[i / 2][n][i % 2 * 2], *high = low + 1;
                    unsigned pair = narrow_activated<T, ACTIVATION>(*low, *high);
                    store_shared(result + (i * 8 + lane / 4) * RESULT_PITCH + n * 16 + lane % 4 * 4, pair);
                    if (PARTS && to_sum >> i & 1) {
                        Floats2 rounded = widen<T>(pair);
                        totals[n].x += rounded.x, totals[n].y += rounded.y;
                    }
                }
            }
            if constexpr (PARTS) {
#pragma unroll
                for (int n = 0; n < UNIT; ++n) {
                    totals[n] = over_rows(totals[n]);
                    if (lane < 4) store_shared(to_sums + n * 8 * 4, totals[n]);
                }
            }
            if constexpr (MOMENTS) {
#pragma unroll 1
                for (int n = 0; n < UNIT; ++n) {  // each lane reads what it has written itself
                    Floats2 rounded[2 * SIXTEENS], total = {0.0f, 0.0f}, squares = {0.0f, 0.0f};
#pragma unroll
                    for (int i = 0; i < 2 * SIXTEENS; ++i) {
                        unsigned at = result + (i * 8 + lane / 4) * RESULT_PITCH + n * 16 + lane % 4 * 4;
                        rounded[i] = widen<T>(load_shared<unsigned>(at));
                        if (to_sum >> i & 1) total.x += rounded[i].x, total.y += rounded[i].y;
                    }
                    total = over_rows(total);
                    const Floats2 mean = {total.x * share, total.y * share};
#pragma unroll
                    for (int i = 0; i < 2 * SIXTEENS; ++i) {
                        if (!(to_sum >> i & 1)) continue;
                        squares.x += (rounded[i].x - mean.x) * (rounded[i].x - mean.x);
                        squares.y += (rounded[i].y - mean.y) * (rounded[i].y - mean.y);
                    }
                    squares = over_rows(squares);
                    if (lane < 4) store_shared(to_sums + n * 8 * 8, Floats4{mean.x, squares.x, mean.y, squares.y});
                }
            }
            sync_warp();
            char* first = reinterpret_cast<char*>(y + (long long)now.pixel * channels + out);
            const int storing = RESIDENT ? lane : forget(lane);
#pragma unroll
            for (int i = 0; i < RESULTS; ++i)
                if (now.own >> i & 1)
                    store_global(
                        reinterpret_cast<Eight*>(first + (RESIDENT ? to[i] : bytes_to(result_of(storing, i)))),
                        load_shared<Eight>(result + (lane + i * 32) * 16));
            if constexpr (!RESIDENT) begin(out);
        };
        if constexpr (ONE_UNIT) {
            if (warp_n < known_groups * UNITS_IN_GROUP) compute(warp_n);
        } else {
            for (int unit = warp_n; unit < known_groups; unit += WARPS_N) compute(unit);
        }
        if (PARTS && last) {
            sync_block();  // the warps' sums are there
#pragma unroll
            for (int i = 0; i < ROWS_OF_THREAD; ++i) {
                int row = thread_x() + i * THREADS;
                if (row >= known_rows) continue;
                float total = 0.0f;
#pragma unroll
                for (int m = 0; m < WARPS_M; ++m) total += load_shared<float>(column_sums + (m * ROWS + row) * 4);
                const long long place = (long long)(first_tile + step / STEPS) * channels;
                store_global(parts + place + (first_channel + row), total * pixel_share);
            }
        }
        if (MOMENTS && last) {
            sync_block();  // the warps' moments are there
#pragma unroll
            for (int i = 0; i < ROWS_OF_THREAD; ++i) {
                int row = thread_x() + i * THREADS;
                if (row >= known_rows) continue;
                for (int m = 0; m < WARPS_M; ++m) {
                    Floats2 two = load_shared<Floats2>(column_sums + (m * ROWS + row) * 8);
                    merge(found[i], {load_shared<float>(counts + m * 4), two.x, two.y});
                }
            }
        }
    }
    wait_copies<0>();
    if constexpr (MOMENTS) {
#pragma unroll
        for (int i = 0; i < ROWS_OF_THREAD; ++i) {
            int row = thread_x() + i * THREADS;
            if (row >= known_rows) continue;
            float* to = moments + (long long)block_x() * 3 * channels + first_channel + row;
            store_global(to, found[i].count);
            store_global(to + channels, found[i].mean);
            store_global(to + 2 * channels, found[i].squares);
        }
    }
}
