// Element types and activations, the same on a GPU and in the simulator. Included by primitives.cuh.
#pragma once

struct BFloat16 {
    unsigned short bits;
};

struct Float16 {
    unsigned short bits;
};

// Eight 16-bit elements, or four words: what one 16-byte access moves.
struct alignas(16) Eight {
    unsigned pair[4];
};

struct alignas(8) Floats2 {
    float x, y;
};

struct alignas(16) Floats4 {
    float x, y, z, w;
};

enum Activation { NONE, RELU, SILU, RELU6, HARDSWISH, SIGMOID, HARDSIGMOID };
