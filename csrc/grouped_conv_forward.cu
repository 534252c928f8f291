// Grouped 3x3 convolution, padding 1, stride 1 or 2, with bias, activation and parts of the channel means:
//
//     y[p, g, n] = activation(sum_(tap, c) x[STRIDE p + tap - 1, g, c] * weight[g, n, tap, c] + bias[g, n])
//     parts[tile, g, n] = sum of y over the tile's pixels / pixels of an image
//
//   x (images, height, columns, groups * WIDTH), y (images, out_height, out_columns, groups * WIDTH): T
//   weight (groups * WIDTH, 9 * WIDTH), tap by tap: T; bias (groups * WIDTH) or null: float
//   parts (images * tiles of an image, groups * WIDTH): float, with PARTS
//
// A block walks over tiles of TILE_H x TILE_W output pixels, block_x() + i grid_x(), of one slab, block_y(): GROUPS groups
// with all their channels, whose weights stay in shared memory (CHUNK == WIDTH); or OUT_TILE output channels of a wide
// group, whose input channels come CHUNK at a time together with their weights. The input's tile with its halo is read
// once for all nine taps, STAGES steps ahead. The sum runs over (tap, chunk of eight channels) as one index, so that any
// multiple of eight fills the matrix instruction. Warps: WARPS_M over pixels, WARPS_N over units of UNIT times eight
// output channels.
#include "grouped_conv.cuh"

template <
    class T, int WIDTH, int GROUPS, int CHUNK, int OUT_TILE, int UNIT, int STRIDE, int TILE_H, int TILE_W, int WARPS_M,
    int WARPS_N, int STAGES, int ACTIVATION, bool PARTS>
KERNEL(32 * WARPS_M * WARPS_N, 65536 / (168 * 32 * WARPS_M * WARPS_N))
grouped_conv_forward(
    const T* x, const T* weight, const float* bias, T* y, float* parts, int images, int height, int columns,
    int out_height, int out_columns, int groups) {
    constexpr int THREADS = 32 * WARPS_M * WARPS_N, PIXELS = TILE_H * TILE_W;
    constexpr int SIXTEENS = ceil_div(PIXELS, 16 * WARPS_M), UNITS_IN_GROUP = OUT_TILE / (8 * UNIT);
    constexpr int UNITS = GROUPS * UNITS_IN_GROUP, STEPS = ceil_div(WIDTH, CHUNK), OUT_TILES = ceil_div(WIDTH, OUT_TILE);
    constexpr int CHUNKS = CHUNK / 8, DEPTH = 9 * CHUNKS;
    constexpr bool RESIDENT = STEPS == 1;
    static_assert(CHUNK % 8 == 0 && OUT_TILE % (8 * UNIT) == 0, "channels in eights");
    static_assert(GROUPS == 1 || (RESIDENT && OUT_TILE == WIDTH), "several groups only as a whole");
    static_assert(RESIDENT || UNITS == WARPS_N, "sums that outlive a step are one unit for each warp");

    using Halo = Tile<(TILE_H - 1) * STRIDE + 3, (TILE_W - 1) * STRIDE + 3, GROUPS * CHUNKS, STRIDE == 2>;
    constexpr int WEIGHT_PITCH = odd_pitch(DEPTH), WEIGHT_BYTES = GROUPS * OUT_TILE * WEIGHT_PITCH;
    constexpr int STAGE_BYTES = Halo::BYTES + (RESIDENT ? 0 : WEIGHT_BYTES);
    constexpr int RESULT_PITCH = odd_pitch(UNIT), RESULT_BYTES = SIXTEENS * 16 * RESULT_PITCH;
    const unsigned stages = shared_base(), weights = stages + STAGES * STAGE_BYTES;
    const unsigned results = weights + (RESIDENT ? WEIGHT_BYTES : 0), column_sums = results + WARPS_M * WARPS_N * RESULT_BYTES;

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
    auto copy_step = [&](int step) {
        if (step < steps) {
            Place place(block_x() + step / STEPS * grid_x(), down, across, TILE_H, TILE_W);
            int channel = step % STEPS * CHUNK;
            const T* map = x + (long long)place.image * height * columns * channels + group * WIDTH + channel;
            int known = RESIDENT ? known_groups * CHUNKS : (WIDTH - channel) / 8;
            unsigned stage = stages + step % STAGES * STAGE_BYTES;
            Halo::template copy<THREADS>(
                stage, map, place.top * STRIDE - 1, place.left * STRIDE - 1, height, columns, channels, known);
            if constexpr (!RESIDENT) copy_weights(stage + Halo::BYTES, channel);
        }
        commit_copies();
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
    for (int step = 0; step < steps; ++step) {
        wait_copies<STAGES - 2>();
        sync_block();  // this step's pixels are there, and nobody reads those of the step before any more
        copy_step(step + STAGES - 1);
        const unsigned stage = stages + step % STAGES * STAGE_BYTES;
        const Place place(block_x() + step / STEPS * grid_x(), down, across, TILE_H, TILE_W);
        auto inside = [&](int pixel) {
            return pixel < PIXELS && place.top + pixel / TILE_W < out_height && place.left + pixel % TILE_W < out_columns;
        };
        unsigned inner = 0;  // which of this lane's rows of sums are pixels of the image
        if constexpr (PARTS) {
#pragma unroll 1
            for (int i = 0; i < 2 * SIXTEENS; ++i)
                inner |= unsigned(inside(warp_m * SIXTEENS * 16 + i * 8 + lane / 4)) << i;
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
#pragma unroll
                    for (int mask = 4; mask < 32; mask *= 2) {
                        total.x += shuffle_xor(total.x, mask);
                        total.y += shuffle_xor(total.y, mask);
                    }
                    if (lane < 4) {
                        int place = warp_m * GROUPS * OUT_TILE + row + n * 8 + lane * 2;
                        store_shared(column_sums + place * 4, total);
                    }
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
            for (int row = thread_x(); row < GROUPS * OUT_TILE; row += THREADS) {
                int which = row / OUT_TILE, n = first_out + row % OUT_TILE;
                if (which >= known_groups || n >= WIDTH) continue;
                float total = 0.0f;
                for (int m = 0; m < WARPS_M; ++m)
                    total += load_shared<float>(column_sums + (m * GROUPS * OUT_TILE + row) * 4);
                long long place = (long long)tile * channels + (group + which) * WIDTH + n;
                store_global(parts + place, total / (out_height * out_columns));
            }
        }
    }
    wait_copies<0>();
}
