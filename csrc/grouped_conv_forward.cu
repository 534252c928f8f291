// Grouped 3x3 convolution, padding 1, stride 1 or 2, with bias, activation and sums over pixels:
//
//     y[p, g, n] = activation(sum_(tap, c) read(x)[STRIDE p + tap - 1, g, c] * weight[g, n, tap, c] + bias[g, n])
//     read(x) = read_activation(x * scale + shift)             with NORM; else x. Zero outside the image
//     parts[tile, g, n] = sum of y over the tile's pixels / pixels of an image
//     moments[worker, :, g, n] = count, mean and centred sum of squares of y over the worker's tiles
//
//   x (images, height, columns, groups * WIDTH), y (images, out_height, out_columns, groups * WIDTH): T
//   weight (groups * WIDTH, 9 * WIDTH), tap by tap: T; bias (groups * WIDTH) or null: float
//   scale, shift (groups * WIDTH): float, with NORM
//   parts (images * tiles of an image, groups * WIDTH): float, with PARTS
//   moments (workers, 3, groups * WIDTH): float, with MOMENTS. Both are of y as it is rounded
//
// A block walks over tiles of TILE_H x TILE_W output pixels, block_x() + i grid_x(), of one slab, block_y(): GROUPS groups
// with all their channels, whose weights stay in shared memory (CHUNK == WIDTH); or OUT_TILE output channels of a wide
// group, whose input channels come CHUNK at a time together with their weights. The input's tile with its halo is read
// once for all nine taps, STAGES steps ahead. The sum runs over (tap, chunk of eight channels) as one index, so that any
// multiple of eight fills the matrix instruction. Warps: WARPS_M over pixels, WARPS_N over units of UNIT times eight
// output channels.
#include "grouped_conv.cuh"
#include "moments.cuh"

template <
    class T, int WIDTH, int GROUPS, int CHUNK, int OUT_TILE, int UNIT, int STRIDE, int TILE_H, int TILE_W, int WARPS_M,
    int WARPS_N, int STAGES, int ACTIVATION, bool PARTS, bool NORM, int READ_ACTIVATION, bool MOMENTS>
KERNEL(32 * WARPS_M * WARPS_N, 65536 / (168 * 32 * WARPS_M * WARPS_N))
grouped_conv_forward(
    const T* x, const float* scale, const float* shift, const T* weight, const float* bias, T* y, float* parts,
    float* moments, int images, int height, int columns, int out_height, int out_columns, int groups) {
    constexpr int THREADS = 32 * WARPS_M * WARPS_N, PIXELS = TILE_H * TILE_W;
    constexpr int SIXTEENS = ceil_div(PIXELS, 16 * WARPS_M), UNITS_IN_GROUP = OUT_TILE / (8 * UNIT);
    constexpr int UNITS = GROUPS * UNITS_IN_GROUP, STEPS = ceil_div(WIDTH, CHUNK), OUT_TILES = ceil_div(WIDTH, OUT_TILE);
    constexpr int CHUNKS = CHUNK / 8, DEPTH = 9 * CHUNKS;
    constexpr bool RESIDENT = STEPS == 1;
    static_assert(CHUNK % 8 == 0 && OUT_TILE % (8 * UNIT) == 0, "channels in eights");
    static_assert(GROUPS == 1 || (RESIDENT && OUT_TILE == WIDTH), "several groups only as a whole");
    static_assert(RESIDENT || UNITS == WARPS_N, "sums that outlive a step are one unit for each warp");
    static_assert(!(PARTS && MOMENTS), "one kind of sums");

    using Halo = Tile<(TILE_H - 1) * STRIDE + 3, (TILE_W - 1) * STRIDE + 3, GROUPS * CHUNKS, STRIDE == 2>;
    constexpr int WEIGHT_PITCH = odd_pitch(DEPTH), WEIGHT_BYTES = GROUPS * OUT_TILE * WEIGHT_PITCH;
    constexpr int STAGE_BYTES = Halo::BYTES + (RESIDENT ? 0 : WEIGHT_BYTES);
    constexpr int RESULT_PITCH = odd_pitch(UNIT), RESULT_BYTES = SIXTEENS * 16 * RESULT_PITCH;
    constexpr int ROWS = GROUPS * OUT_TILE, ROWS_OF_THREAD = ceil_div(ROWS, THREADS);
    const unsigned stages = shared_base(), weights = stages + STAGES * STAGE_BYTES;
    const unsigned results = weights + (RESIDENT ? WEIGHT_BYTES : 0), column_sums = results + WARPS_M * WARPS_N * RESULT_BYTES;
    const unsigned counts = column_sums + WARPS_M * ROWS * 8;  // of the pixels of each warp's rows

    const int lane = thread_x() % 32, warp = thread_x() / 32, warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
    const int channels = groups * WIDTH, down = ceil_div(out_height, TILE_H), across = ceil_div(out_columns, TILE_W);
    const int group = block_y() / OUT_TILES * GROUPS, first_out = block_y() % OUT_TILES * OUT_TILE;
    const int known_groups = groups - group < GROUPS ? groups - group : GROUPS;
    const int tiles = images * down * across;
    const int steps = ceil_div(tiles - block_x(), grid_x()) * STEPS;
    const unsigned result = results + warp * RESULT_BYTES;

    auto copy_weights = [&](unsigned address, int first_channel) {
#pragma unroll 1
        for (int i = thread_x(); i < GROUPS * OUT_TILE * DEPTH; i += THREADS) {
            int row = i / DEPTH, k = i % DEPTH, channel = first_channel + k % CHUNKS * 8;
            bool known = row / OUT_TILE < known_groups && first_out + row % OUT_TILE < WIDTH && channel < WIDTH;
            long long place = (long long)(group * WIDTH + first_out + row) * (9 * WIDTH) + k / CHUNKS * WIDTH + channel;
            copy_async(address + row * WEIGHT_PITCH + k * 16, known ? weight + place : weight, known);
        }
    };
    auto place_of = [&](int step) { return Place(block_x() + step / STEPS * grid_x(), down, across, TILE_H, TILE_W); };
    auto known_of = [&](int channel) { return RESIDENT ? known_groups * CHUNKS : (WIDTH - channel) / 8; };
    auto copy_step = [&](int step) {
        if (step < steps) {
            Place place = place_of(step);
            int channel = step % STEPS * CHUNK, known = known_of(channel);
            const T* map = x + (long long)place.image * height * columns * channels + group * WIDTH + channel;
            unsigned stage = stages + step % STAGES * STAGE_BYTES;
            Halo::template copy<THREADS>(
                stage, map, place.top * STRIDE - 1, place.left * STRIDE - 1, height, columns, channels, known);
            if constexpr (!RESIDENT) copy_weights(stage + Halo::BYTES, channel);
        }
        commit_copies();
    };
    // Each thread makes read(x) of the chunks that it copied itself, but for what is outside and stays zero.
    auto read_step = [&](int step) {
        const Place place = place_of(step);
        const int channel = step % STEPS * CHUNK, known = known_of(channel);
        Halo::template visit<THREADS>(
            stages + step % STAGES * STAGE_BYTES, [&](int row, int column, int chunk, unsigned at) {
                int h = place.top * STRIDE - 1 + row, w = place.left * STRIDE - 1 + column;
                if (h < 0 || h >= height || w < 0 || w >= columns || chunk >= known) return;
                read_through<T, READ_ACTIVATION>(at, scale, shift, group * WIDTH + channel + chunk * 8);
            });
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
        return Halo::offset(k / CHUNKS / 3, k / CHUNKS % 3) + k % CHUNKS * 16;
    };

    if constexpr (RESIDENT) copy_weights(weights, 0);
    for (int step = 0; step < STAGES - 1; ++step) copy_step(step);
    float sums[SIXTEENS][UNIT][4];
    Moments found[ROWS_OF_THREAD] = {};
    for (int step = 0; step < steps; ++step) {
        wait_copies<STAGES - 2>();
        if constexpr (NORM) read_step(step);
        sync_block();  // this step's pixels are there, and nobody reads those of the step before any more
        copy_step(step + STAGES - 1);
        const unsigned stage = stages + step % STAGES * STAGE_BYTES;
        const Place place = place_of(step);
        auto inside = [&](int pixel) {
            return pixel < PIXELS && place.top + pixel / TILE_W < out_height && place.left + pixel % TILE_W < out_columns;
        };
        unsigned inner = 0;  // which of this lane's rows of sums are pixels of the image
        float count = 0.0f, share = 0.0f;  // of the warp's, and 1 / count
        if constexpr (PARTS || MOMENTS) {
#pragma unroll 1
            for (int i = 0; i < 2 * SIXTEENS; ++i) {
                bool pixel = inside(warp_m * SIXTEENS * 16 + i * 8 + lane / 4);
                inner |= unsigned(pixel) << i;
                count += pixel;
            }
        }
        if constexpr (MOMENTS) {
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) count += shuffle_xor(count, mask);
            if (count > 0.0f) share = 1.0f / count;
            if (step % STEPS == STEPS - 1 && warp_n == 0 && lane == 0) store_shared(counts + warp_m * 4, count);
        }
        for (int unit = warp_n; unit < UNITS; unit += WARPS_N) {
            const int which = unit / UNITS_IN_GROUP, row = which * OUT_TILE + unit % UNITS_IN_GROUP * UNIT * 8;
            const int first = first_out + row % OUT_TILE, out = (group + which) * WIDTH + first;
            const int known = which >= known_groups ? 0 : (WIDTH - first) / 8 < UNIT ? (WIDTH - first) / 8 : UNIT;
            if (step % STEPS == 0) {
#pragma unroll
                for (int n = 0; n < UNIT; ++n) {
                    Floats2 start = {0.0f, 0.0f};
                    if (bias && n < known)
                        start = load_global(reinterpret_cast<const Floats2*>(bias + out + n * 8 + lane % 4 * 2));
#pragma unroll
                    for (int j = 0; j < SIXTEENS; ++j) {
                        sums[j][n][0] = sums[j][n][2] = start.x;
                        sums[j][n][1] = sums[j][n][3] = start.y;
                    }
                }
            }
            unsigned from[SIXTEENS];
#pragma unroll
            for (int j = 0; j < SIXTEENS; ++j) from[j] = stage + pixels[j] + which * CHUNKS * 16;
            multiply<T, DEPTH, SIXTEENS, UNIT, DEPTH>(
                sums, from, (RESIDENT ? weights : stage + Halo::BYTES) + row * WEIGHT_PITCH, taps);
            if (step % STEPS != STEPS - 1) continue;

            const int first_row = warp_m * ROWS + row;
            sync_warp();  // the last results have left
#pragma unroll
            for (int n = 0; n < UNIT; ++n) {
                Floats2 total = {0.0f, 0.0f};
#pragma unroll
                for (int j = 0; j < SIXTEENS; ++j) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        int pixel = j * 16 + half * 8 + lane / 4;
                        unsigned pair = narrow<T>(
                            activate<ACTIVATION>(sums[j][n][2 * half]), activate<ACTIVATION>(sums[j][n][2 * half + 1]));
                        store_shared(result + pixel * RESULT_PITCH + n * 16 + lane % 4 * 4, pair);
                        if (PARTS && inner >> (2 * j + half) & 1) {
                            Floats2 rounded = widen<T>(pair);
                            total.x += rounded.x, total.y += rounded.y;
                        }
                    }
                }
                if constexpr (PARTS) {
                    total = over_rows(total);
                    if (lane < 4) store_shared(column_sums + (first_row + n * 8 + lane * 2) * 4, total);
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
                        if (inner >> i & 1) total.x += rounded[i].x, total.y += rounded[i].y;
                    }
                    total = over_rows(total);
                    const Floats2 mean = {total.x * share, total.y * share};
#pragma unroll
                    for (int i = 0; i < 2 * SIXTEENS; ++i) {
                        if (!(inner >> i & 1)) continue;
                        squares.x += (rounded[i].x - mean.x) * (rounded[i].x - mean.x);
                        squares.y += (rounded[i].y - mean.y) * (rounded[i].y - mean.y);
                    }
                    squares = over_rows(squares);
                    const unsigned to = column_sums + (first_row + n * 8 + lane * 2) * 8;
                    if (lane < 4) store_shared(to, Floats4{mean.x, squares.x, mean.y, squares.y});
                }
            }
            sync_warp();
#pragma unroll 1
            for (int i = lane; i < SIXTEENS * 16 * UNIT; i += 32) {
                int n = i % UNIT, local = i / UNIT, pixel = warp_m * SIXTEENS * 16 + local;
                if (n < known && inside(pixel)) {
                    int h = place.top + pixel / TILE_W, w = place.left + pixel % TILE_W;
                    T* image = y + (long long)place.image * out_height * out_columns * channels;
                    store_global(
                        reinterpret_cast<Eight*>(image + (h * out_columns + w) * channels + out + n * 8),
                        load_shared<Eight>(result + local * RESULT_PITCH + n * 16));
                }
            }
        }
        if (PARTS && step % STEPS == STEPS - 1) {
            sync_block();
            int tile = block_x() + step / STEPS * grid_x();
            for (int row = thread_x(); row < ROWS; row += THREADS) {
                int which = row / OUT_TILE, n = first_out + row % OUT_TILE;
                if (which >= known_groups || n >= WIDTH) continue;
                float total = 0.0f;
                for (int m = 0; m < WARPS_M; ++m)
                    total += load_shared<float>(column_sums + (m * ROWS + row) * 4);
                long long place = (long long)tile * channels + (group + which) * WIDTH + n;
                store_global(parts + place, total / (out_height * out_columns));
            }
        }
        if (MOMENTS && step % STEPS == STEPS - 1) {
            sync_block();  // the warps' moments are there
#pragma unroll
            for (int i = 0; i < ROWS_OF_THREAD; ++i) {
                int row = thread_x() + i * THREADS;
                if (row >= ROWS) continue;
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
            int row = thread_x() + i * THREADS, which = row / OUT_TILE, n = first_out + row % OUT_TILE;
            if (row >= ROWS || which >= known_groups || n >= WIDTH) continue;
            float* to = moments + (long long)block_x() * 3 * channels + (group + which) * WIDTH + n;
            store_global(to, found[i].count);
            store_global(to + channels, found[i].mean);
            store_global(to + 2 * channels, found[i].squares);
        }
    }
}
