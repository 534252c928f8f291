// The matrix unit of Intel's processors (AMX): registers of 16 rows of 64 bytes, and the product of two in bfloat16.
//
// With AMX_EMULATED in the place of the unit, for a processor that has none and for what watches memory.

#pragma once

#include "vector.h"

#if defined(__AMX_BF16__) && !defined(AMX_EMULATED)
#define AMX_UNIT 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(AMX_UNIT) || defined(AMX_EMULATED)
constexpr bool HAS_AMX = true;
#else
constexpr bool HAS_AMX = false;
#endif

constexpr int SIDE = 16;  // rows of a register, and numbers of float32 in one

/// The shapes of the registers, as `ldtilecfg` reads them.
struct alignas(64) Shapes {
    unsigned char palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    unsigned char rows[16] = {};

    /// Registers 0 to 3 for sums, 4 and 5 for so many pixels, 6 and 7 for weights, of so many terms.
    Shapes(int pixels, int terms) {
        for (int r = 0; r < 8; r++) {
            rows[r] = static_cast<unsigned char>(r < 6 ? pixels : terms / 2);
            bytes[r] = uint16_t(r == 4 || r == 5 ? 2 * terms : 64);
        }
    }
};

#if defined(AMX_UNIT)

/// Whether the system lets this process use the unit.
inline bool amx_allowed() {
    constexpr int REQUEST = 0x1023, DATA_OF_TILES = 18;
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, DATA_OF_TILES) == 0;
    return allowed;
}

/// Gives the registers their shapes, and gives them back.
struct Registers {
    explicit Registers(const Shapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
    ~Registers() { asm volatile("tilerelease"); }
};

template <int R>
ALWAYS void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(R));
}

template <int R>
ALWAYS void tile_load(const void* p, int64_t step) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(R), "r"(p), "r"(step) : "memory");
}

template <int R>
ALWAYS void tile_store(void* p, int64_t step) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(R), "r"(p), "r"(step) : "memory");
}

/// Register SUM += X W, where a row of W holds neighbouring terms in pairs.
template <int SUM, int X, int W>
ALWAYS void tile_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(W));
}

#elif defined(AMX_EMULATED)

inline bool amx_allowed() { return true; }

struct Emulated {
    Shapes shapes{0, 0};
    uint32_t words[8][SIDE][SIDE];
};

inline Emulated& emulated() {
    static thread_local Emulated unit;
    return unit;
}

struct Registers {
    explicit Registers(const Shapes& shapes) { emulated().shapes = shapes; }
    ~Registers() { emulated().shapes = Shapes(0, 0); }
};

template <int R>
void tile_zero() {
    std::memset(emulated().words[R], 0, sizeof(emulated().words[R]));
}

template <int R>
void tile_load(const void* p, int64_t step) {
    Emulated& unit = emulated();
    std::memset(unit.words[R], 0, sizeof(unit.words[R]));
    for (int i = 0; i < unit.shapes.rows[R]; i++)
        std::memcpy(unit.words[R][i], static_cast<const char*>(p) + i * step, unit.shapes.bytes[R]);
}

template <int R>
void tile_store(void* p, int64_t step) {
    Emulated& unit = emulated();
    for (int i = 0; i < unit.shapes.rows[R]; i++)
        std::memcpy(static_cast<char*>(p) + i * step, unit.words[R][i], unit.shapes.bytes[R]);
}

inline float number_of(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

template <int SUM, int X, int W>
void tile_product() {
    Emulated& unit = emulated();
    for (int i = 0; i < unit.shapes.rows[SUM]; i++)
        for (int j = 0; j < unit.shapes.bytes[SUM] / 4; j++) {
            float sum = number_of(unit.words[SUM][i][j]);
            for (int k = 0; k < unit.shapes.bytes[X] / 4; k++) {
                const uint32_t x = unit.words[X][i][k], w = unit.words[W][k][j];
                sum += number_of(x << 16) * number_of(w << 16) + number_of(x & 0xffff0000) * number_of(w & 0xffff0000);
            }
            std::memcpy(&unit.words[SUM][i][j], &sum, 4);
        }
}

#else

inline bool amx_allowed() { return false; }

#endif

}  // namespace
