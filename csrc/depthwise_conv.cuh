// What the depthwise kernels share: eight channels of a pixel in a thread, and sums over a block's threads.
#pragma once

#include "grouped_conv.cuh"

struct Channels {
    float of[8];
};

template <class T>
DEVICE Channels spread(Eight value) {
    Channels wide;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        Floats2 two = widen<T>(value.pair[i]);
        wide.of[2 * i] = two.x, wide.of[2 * i + 1] = two.y;
    }
    return wide;
}

template <class T>
DEVICE Eight gathered(const Channels& wide) {
    Eight value;
#pragma unroll
    for (int i = 0; i < 4; ++i) value.pair[i] = narrow<T>(wide.of[2 * i], wide.of[2 * i + 1]);
    return value;
}

template <class T>
DEVICE Eight load_eight(const T* from) {
    return load_global(reinterpret_cast<const Eight*>(from));
}

DEVICE Channels load_channels(const float* from) {
    Channels wide;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        Floats2 two = load_global(reinterpret_cast<const Floats2*>(from) + i);
        wide.of[2 * i] = two.x, wide.of[2 * i + 1] = two.y;
    }
    return wide;
}

// The sums of `mine` over the threads with the same lane, thread_x() % LANES, in their order, to to[0 .. known): LANES
// times eight channels. Takes THREADS * 32 bytes of shared memory.
template <int THREADS, int LANES>
DEVICE void sum_of_block(const Channels& mine, float factor, float* to, int known) {
    const unsigned base = shared_base();
    sync_block();  // the sums before have been read
#pragma unroll
    for (int i = 0; i < 4; ++i)
        store_shared(base + thread_x() * 32 + i * 8, Floats2{mine.of[2 * i], mine.of[2 * i + 1]});
    sync_block();
    for (int i = thread_x(); i < LANES * 8 && i < known; i += THREADS) {
        float total = 0.0f;
        for (int t = 0; t < THREADS / LANES; ++t) total += load_shared<float>(base + t * LANES * 32 + i * 4);
        store_global(to + i, total * factor);
    }
}
