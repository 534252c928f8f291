// Mean and biased variance of every channel, from the moments of parts of its values, in their order:
//
//     mean[c] = sum_t count[t] mean[t, c] / sum_t count[t]
//     var[c] = sum_t (squares[t, c] + count[t] (mean[t, c] - mean[c])^2) / sum_t count[t]
//
//   moments (parts, 3, channels): count, mean and centred sum of squares; mean, var (channels): float
//
// A lane takes a channel, a warp every WARPS-th part.
#include "moments.cuh"

template <int WARPS>
KERNEL(32 * WARPS, 1) merged_moments(const float* moments, float* mean, float* var, int parts, int channels) {
    const int warp = thread_x() / 32, lane = thread_x() % 32, channel = block_x() * 32 + lane;
    const unsigned mine = shared_base() + thread_x() * 4, sums = 32 * WARPS * 4;
    Moments found = {0.0f, 0.0f, 0.0f};
    if (channel < channels) {
        for (int part = warp; part < parts; part += WARPS) {
            const float* from = moments + (long long)part * 3 * channels + channel;
            merge(found, {load_global(from), load_global(from + channels), load_global(from + 2 * channels)});
        }
    }
    store_shared(mine, found.count), store_shared(mine + sums, found.mean), store_shared(mine + 2 * sums, found.squares);
    sync_block();
    if (warp > 0 || channel >= channels) return;
    for (int other = 1; other < WARPS; ++other) {
        const unsigned at = mine + other * 128;
        merge(found, {load_shared<float>(at), load_shared<float>(at + sums), load_shared<float>(at + 2 * sums)});
    }
    store_global(mean + channel, found.mean);
    store_global(var + channel, found.squares / found.count);
}
