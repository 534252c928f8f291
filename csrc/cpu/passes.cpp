// The passes of a training step over float32 maps in channels_last, on a CPU: each reads every map once.
//
// A map is `images` times `length` floats, pixel after pixel. It is taken in rows of `width` floats: one pixel, or
// several where there are few channels, so that rows fill the processor's vectors; what is given for each channel is
// repeated along a row. Sums are made in float over `ROWS` rows and in double beyond, of units of work that do not
// depend on the number of threads, and are added in their order: two runs agree to the bit.
//
// Activations are numbers: 0 none, 1 ReLU, 2 SiLU. Compiled and loaded by regnet_fast/backends/cpu_library.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using std::int64_t;

constexpr int64_t ROWS = 32;
constexpr int64_t NEAR = 8;        // rows whose mean the values of a block are taken about
constexpr int64_t UNIT = 1 << 14;  // floats that a thread takes at a time, at least
constexpr int64_t TILE = 1 << 11;  // floats that stay in the first cache between the steps of a join

enum Activation { NONE, RELU, SILU };

struct Map {
    int64_t images, length, channels, width;
};

/// exp(x) to about 1 ulp from -87 to 88, exp(-87) below and infinity above, in operations that compilers vectorise.
/// Source: S. Moshier, Cephes, `expf`.
inline float exponential(float x) {
    const float low = x < -87.0f ? -87.0f : x;
    const float shifted = low * 1.44269504f + 12582912.0f;  // the nearest integer in the last bits
    const float n = shifted - 12582912.0f;
    const float r = low - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + (127u << 23);
    float power;
    std::memcpy(&power, &bits, 4);
    return x > 88.0f ? std::numeric_limits<float>::infinity() : p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <int A>
inline float activate(float z) {
    static_assert(A == NONE || A == RELU || A == SILU, "no such activation");
    if (A == RELU) return z < 0.0f ? 0.0f : z;
    if (A == SILU) return z / (1.0f + exponential(-z));
    return z;
}

/// The gradient before an activation of z, from that behind it.
template <int A>
inline float through_activation(float z, float grad) {
    static_assert(A == NONE || A == RELU || A == SILU, "no such activation");
    if (A == RELU) return z <= 0.0f ? 0.0f : grad;
    if (A == SILU) {
        const float s = sigmoid(z);
        return grad * (s * (1.0f + z * (1.0f - s)));
    }
    return grad;
}

/// What a map is read with, by columns of a row: z = x * scale + shift, xhat = (x - mean) * invstd.
struct Norm {
    const float *scale, *shift, *mean, *invstd;

    /// The rows, or null pointers of a map that is read as it is.
    Norm(const float* rows, int64_t width)
        : scale(rows),
          shift(rows ? rows + width : nullptr),
          mean(rows ? rows + 2 * width : nullptr),
          invstd(rows ? rows + 3 * width : nullptr) {}
};

/// The floats of a unit: whole blocks of `ROWS` rows.
int64_t unit_of(const Map& map) {
    const int64_t block = map.width * ROWS;
    return block * std::max<int64_t>(1, UNIT / block);
}

int64_t units_of(const Map& map) {
    const int64_t step = unit_of(map);
    return (map.length + step - 1) / step * map.images;
}

/// Call `work(unit, image, begin, end, scratch)` for parts of all images, with `floats` of scratch memory.
template <class Work>
void for_units(const Map& map, int64_t floats, int threads, Work work) {
    const int64_t step = unit_of(map), each = (map.length + step - 1) / step, count = map.images * each;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch(floats);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < count; ++unit) {
            const int64_t image = unit / each, begin = unit % each * step;
            work(unit, image, begin, std::min(map.length, begin + step), scratch.data());
        }
    }
}

/// `work(at, n)` for the rows from begin to end: n columns from `at`.
template <class Work>
inline void for_rows(int64_t begin, int64_t end, int64_t width, Work work) {
    for (int64_t at = begin; at < end; at += width) work(at, std::min(width, end - at));
}

/// Repeat what is given for each channel along a row.
void repeat(const float* values, const Map& map, float* row) {
    for (int64_t j = 0; j < map.width; j += map.channels) std::copy(values, values + map.channels, row + j);
}

/// Add a row of doubles to those of the channels.
void fold(const double* row, const Map& map, double* sums) {
    for (int64_t j = 0; j < map.width; j += map.channels)
        for (int64_t c = 0; c < map.channels; ++c) sums[c] += row[j + c];
}

void flush(float* row, double* sums, int64_t width) {
    for (int64_t j = 0; j < width; ++j) sums[j] += row[j], row[j] = 0.0f;
}

template <int A, bool GATED>
void read(const float* x, float* out, const float* rows, const float* gate, const Map& map, int threads) {
    const Norm norm(rows, map.width);
    for_units(map, map.width, threads, [&](auto, int64_t image, int64_t begin, int64_t end, float* g) {
        if (GATED) repeat(gate + image * map.channels, map, g);
        const float* from = x + image * map.length;
        float* to = out + image * map.length;
        for_rows(begin, end, map.width, [&](int64_t at, int64_t n) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
                const float a = activate<A>(from[at + j] * norm.scale[j] + norm.shift[j]);
                to[at + j] = GATED ? a * g[j] : a;
            }
        });
    });
}

template <int A, bool PRODUCT>
void image_sums(const float* x, const float* grad, float* out, const float* rows, float factor, const Map& map,
                int threads) {
    const Norm norm(rows, map.width);
    const int64_t count = units_of(map), width = map.width;
    std::vector<double> sums(count * width);
    for_units(map, width, threads, [&](int64_t unit, int64_t image, int64_t begin, int64_t end, float* s) {
        const float *from = x + image * map.length, *times = grad + (PRODUCT ? image * map.length : 0);
        std::fill(s, s + width, 0.0f);
        for (int64_t block = begin; block < end; block += width * ROWS) {
            for_rows(block, std::min(end, block + width * ROWS), width, [&](int64_t at, int64_t n) {
#pragma omp simd
                for (int64_t j = 0; j < n; ++j) {
                    const float a = activate<A>(from[at + j] * norm.scale[j] + norm.shift[j]);
                    s[j] += PRODUCT ? a * times[at + j] : a;
                }
            });
            flush(s, &sums[unit * width], width);
        }
    });
    const int64_t each = count / std::max<int64_t>(1, map.images);
    std::vector<double> total(map.channels);
    for (int64_t image = 0; image < map.images; ++image) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t i = 0; i < each; ++i) fold(&sums[(image * each + i) * width], map, total.data());
        for (int64_t c = 0; c < map.channels; ++c) out[image * map.channels + c] = float(total[c] * factor);
    }
}

/// Add what the units left of sum(dz * (x - mean)) and sum(dz) to the sums of a norm.
void add_sums(const std::vector<double>& found, int64_t count, const Norm& norm, const Map& map, double* sums) {
    std::vector<double> total(2 * map.channels);
    for (int64_t unit = 0; unit < count; ++unit)
        for (int64_t i = 0; i < 2; ++i) fold(&found[(2 * unit + i) * map.width], map, &total[i * map.channels]);
    for (int64_t c = 0; c < map.channels; ++c) sums[c] += total[c] * norm.invstd[c];
    for (int64_t c = map.channels; c < 2 * map.channels; ++c) sums[c] += total[c];
}

template <int A, bool GATED>
void through(const float* x, const float* grad, float* out, const float* rows, const float* gate, const float* dmeans,
             double* sums, const Map& map, int threads) {
    const Norm norm(rows, map.width);
    const int64_t count = units_of(map), width = map.width;
    std::vector<double> found(2 * count * width);
    for_units(map, 4 * width, threads, [&](int64_t unit, int64_t image, int64_t begin, int64_t end, float* s) {
        const float *from = x + image * map.length, *arriving = grad + image * map.length;
        float *to = out + image * map.length, *product = s, *plain = s + width, *g = s + 2 * width, *d = s + 3 * width;
        std::fill(s, s + 2 * width, 0.0f);
        if (GATED) repeat(gate + image * map.channels, map, g), repeat(dmeans + image * map.channels, map, d);
        for (int64_t block = begin; block < end; block += width * ROWS) {
            for_rows(block, std::min(end, block + width * ROWS), width, [&](int64_t at, int64_t n) {
#pragma omp simd
                for (int64_t j = 0; j < n; ++j) {
                    const float value = from[at + j], da = arriving[at + j];
                    const float z = value * norm.scale[j] + norm.shift[j];
                    const float dz = through_activation<A>(z, GATED ? da * g[j] + d[j] : da);
                    to[at + j] = dz;
                    product[j] += dz * (value - norm.mean[j]);
                    plain[j] += dz;
                }
            });
            flush(product, &found[2 * unit * width], width);
            flush(plain, &found[(2 * unit + 1) * width], width);
        }
    });
    add_sums(found, count, norm, map, sums);
}

template <bool AFFINE, bool PLUS>
void raw_gradient(const float* grad, const float* y, const float* plus, float* out, const float* rows, const Map& map,
                  int threads) {
    const float *a = rows, *q = rows + map.width, *k = rows + 2 * map.width;
    for_units(map, 0, threads, [&](auto, int64_t image, int64_t begin, int64_t end, float*) {
        const int64_t first = image * map.length;
        for_rows(first + begin, first + end, map.width, [&](int64_t at, int64_t n) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
                float dy = grad[at + j] * a[j];
                if (AFFINE) dy += y[at + j] * q[j] + k[j];
                out[at + j] = PLUS ? dy + plus[at + j] : dy;
            }
        });
    });
}

/// A summand of a join: a map, read through its norm where it has one, times a factor for each image.
struct Term {
    const float *x, *norm, *factor;
    int64_t activation;
};

template <int A, bool NORM, bool ADD>
void add_value(const float* x, const Norm& norm, float factor, float* out, int64_t size, int64_t width) {
    for_rows(0, size, width, [&](int64_t at, int64_t n) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
            const float value = (NORM ? activate<A>(x[at + j] * norm.scale[j] + norm.shift[j]) : x[at + j]) * factor;
            out[at + j] = ADD ? out[at + j] + value : value;
        }
    });
}

template <bool ADD>
void add_term(const Term& term, int64_t image, int64_t begin, float* out, int64_t size, const Map& map) {
    const float* x = term.x + image * map.length + begin;
    const float factor = term.factor ? term.factor[image] : 1.0f;
    const Norm norm(term.norm, map.width);
    if (!term.norm) return add_value<NONE, false, ADD>(x, norm, factor, out, size, map.width);
    if (term.activation == RELU) return add_value<RELU, true, ADD>(x, norm, factor, out, size, map.width);
    if (term.activation == SILU) return add_value<SILU, true, ADD>(x, norm, factor, out, size, map.width);
    add_value<NONE, true, ADD>(x, norm, factor, out, size, map.width);
}

void add_terms(const Term* terms, int64_t count, int64_t image, int64_t begin, float* out, int64_t size,
               const Map& map) {
    add_term<false>(terms[0], image, begin, out, size, map);
    for (int64_t i = 1; i < count; ++i) add_term<true>(terms[i], image, begin, out, size, map);
}

template <int A>
void activate_all(float* values, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) values[i] = activate<A>(values[i]);
}

/// The gradient before an activation whose result or, for SiLU, argument is known.
template <int A>
void inactivate_all(const float* known, const float* grad, float* out, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[i] = through_activation<A>(known[i], grad[i]);
}

template <int A>
void through_term(const float* x, const Norm& norm, float factor, const float* grad, float* out, int64_t size,
                  int64_t width) {
    for_rows(0, size, width, [&](int64_t at, int64_t n) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j)
            out[at + j] = through_activation<A>(x[at + j] * norm.scale[j] + norm.shift[j], grad[at + j] * factor);
    });
}

void multiply(const float* grad, float factor, float* out, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[i] = grad[i] * factor;
}

void sum_rows(const float* grad, const float* x, const Norm& norm, float* product, float* plain, int64_t size,
              int64_t width) {
    for_rows(0, size, width, [&](int64_t at, int64_t n) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
            product[j] += grad[at + j] * (x[at + j] - norm.mean[j]);
            plain[j] += grad[at + j];
        }
    });
}

/// A value near those of every column of a block: the mean of its first rows, or 0 where that is not finite.
void pivots(const float* x, int64_t size, int64_t width, float* near) {
    const int64_t rows = std::clamp<int64_t>(size / width, 1, NEAR), columns = std::min(width, size);
    std::fill(near, near + columns, 0.0f);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < columns; ++j) near[j] += x[row * width + j];
    for (int64_t j = 0; j < columns; ++j) near[j] = std::isfinite(near[j]) ? near[j] / float(rows) : 0.0f;
}

/// The floats of a tile: as many rows as stay in the first cache, at most those of a block.
int64_t tile_of(const Map& map) { return map.width * std::clamp<int64_t>(TILE / map.width, 1, ROWS); }

}  // namespace

extern "C" {

/// rows (4, width) of a norm: weight / sqrt(var + eps), bias - mean * that, mean, 1 / sqrt(var + eps).
void norm_rows(const float* mean, const float* var, const float* weight, const float* bias, float* rows, double eps,
               int64_t channels, int64_t width) {
    for (int64_t c = 0; c < channels; ++c) {
        const double invstd = 1.0 / std::sqrt(double(var[c]) + eps), scale = weight ? weight[c] * invstd : invstd;
        rows[c] = float(scale);
        rows[width + c] = float((bias ? bias[c] : 0.0) - mean[c] * scale);
        rows[2 * width + c] = mean[c];
        rows[3 * width + c] = float(invstd);
    }
    for (int64_t i = 0; i < 4; ++i)
        for (int64_t j = channels; j < width; ++j) rows[i * width + j] = rows[i * width + j - channels];
}

/// rows (3, width) of a, q, k: the gradient of a raw map is a * dz + q * y + k. Without `sums` q and k are not set.
void raw_gradient_rows(const float* mean, const float* var, const float* weight, const float* product,
                       const float* plain, float* rows, double eps, double count, int64_t channels, int64_t width) {
    for (int64_t c = 0; c < channels; ++c) {
        const double invstd = 1.0 / std::sqrt(double(var[c]) + eps), a = weight ? weight[c] * invstd : invstd;
        rows[c] = float(a);
        if (!product) continue;
        const double q = -a * invstd * product[c] / count;
        rows[width + c] = float(q);
        rows[2 * width + c] = float(-q * mean[c] - a * plain[c] / count);
    }
    for (int64_t i = 0; i < (product ? 3 : 1); ++i)
        for (int64_t j = channels; j < width; ++j) rows[i * width + j] = rows[i * width + j - channels];
}

/// out = activation(x * scale + shift), times gate (images, channels) where there is one.
void read_map(const float* x, float* out, const float* rows, const float* gate, int activation, int64_t images,
              int64_t length, int64_t channels, int64_t width, int threads) {
    using Read = void (*)(const float*, float*, const float*, const float*, const Map&, int);
    static constexpr Read ALL[3][2] = {{read<NONE, false>, read<NONE, true>},
                                       {read<RELU, false>, read<RELU, true>},
                                       {read<SILU, false>, read<SILU, true>}};
    ALL[activation][gate != nullptr](x, out, rows, gate, {images, length, channels, width}, threads);
}

/// out (images, channels) = factor * sum over pixels of activation(x * scale + shift), times grad where there is one.
void sums_of_images(const float* x, const float* grad, float* out, const float* rows, int activation, float factor,
                    int64_t images, int64_t length, int64_t channels, int64_t width, int threads) {
    using Sums = void (*)(const float*, const float*, float*, const float*, float, const Map&, int);
    static constexpr Sums ALL[3][2] = {{image_sums<NONE, false>, image_sums<NONE, true>},
                                       {image_sums<RELU, false>, image_sums<RELU, true>},
                                       {image_sums<SILU, false>, image_sums<SILU, true>}};
    ALL[activation][grad != nullptr](x, grad, out, rows, factor, {images, length, channels, width}, threads);
}

/// out = dz, the gradient of the normalised map, from that of activation(z) or, with gate and dmeans (images,
/// channels), of activation(z) * gate; adds sum(dz * xhat) and sum(dz) to sums (2, channels).
void gradient_through(const float* x, const float* grad, float* out, const float* rows, const float* gate,
                      const float* dmeans, double* sums, int activation, int64_t images, int64_t length,
                      int64_t channels, int64_t width, int threads) {
    using Through = void (*)(const float*, const float*, float*, const float*, const float*, const float*, double*,
                             const Map&, int);
    static constexpr Through ALL[3][2] = {{through<NONE, false>, through<NONE, true>},
                                          {through<RELU, false>, through<RELU, true>},
                                          {through<SILU, false>, through<SILU, true>}};
    const Map map{images, length, channels, width};
    ALL[activation][gate != nullptr](x, grad, out, rows, gate, dmeans, sums, map, threads);
}

/// out = a * grad + q * y + k + plus; without y a * grad + plus.
void gradient_of_raw(const float* grad, const float* y, const float* plus, float* out, const float* rows,
                     int64_t images, int64_t length, int64_t channels, int64_t width, int threads) {
    using Raw = void (*)(const float*, const float*, const float*, float*, const float*, const Map&, int);
    static constexpr Raw ALL[2][2] = {{raw_gradient<false, false>, raw_gradient<false, true>},
                                      {raw_gradient<true, false>, raw_gradient<true, true>}};
    ALL[y != nullptr][plus != nullptr](grad, y, plus, out, rows, {images, length, channels, width}, threads);
}

/// Add to state (3, channels): a pivot near the mean, taken from the first map, and the sums of x - pivot and of its
/// square. Within a block of rows values are taken about the mean of the first ones, so that a mean far from zero costs
/// no digits. Copies x to `copy` where there is one.
void add_moments(const float* x, float* copy, double* state, int first, int64_t images, int64_t length,
                 int64_t channels, int64_t width, int threads) {
    const Map map{images, length, channels, width};
    const int64_t count = units_of(map);
    double *pivot = state, *sum = state + channels, *square = state + 2 * channels;
    if (first)
        for (int64_t c = 0; c < channels; ++c) pivot[c] = std::isfinite(x[c]) ? x[c] : 0.0f, sum[c] = square[c] = 0.0;
    std::vector<double> found(2 * count * width);
    for_units(map, 3 * width, threads, [&](int64_t unit, int64_t image, int64_t begin, int64_t end, float* s) {
        const float* from = x + image * length;
        float *near = s, *one = s + width, *two = s + 2 * width;
        double *sums = &found[2 * unit * width], *squares = sums + width;
        for (int64_t block = begin; block < end; block += width * ROWS) {
            const int64_t last = std::min(end, block + width * ROWS), columns = std::min(width, last - block);
            pivots(from + block, last - block, width, near);
            std::fill(one, s + 3 * width, 0.0f);
            for_rows(block, last, width, [&](int64_t at, int64_t n) {
                if (copy) std::copy(from + at, from + at + n, copy + image * length + at);
#pragma omp simd
                for (int64_t j = 0; j < n; ++j) {
                    const float value = from[at + j] - near[j];
                    one[j] += value;
                    two[j] += value * value;
                }
            });
            const int64_t whole = (last - block) / width, rest = (last - block) % width;
            for (int64_t j = 0, c = 0; j < columns; ++j, c = c + 1 == channels ? 0 : c + 1) {
                const double values = double(whole + (j < rest)), offset = near[j] - pivot[c];
                sums[j] += one[j] + values * offset;
                squares[j] += two[j] + offset * (2.0 * one[j] + values * offset);
            }
        }
    });
    for (int64_t unit = 0; unit < count; ++unit) {
        fold(&found[2 * unit * width], map, sum);
        fold(&found[(2 * unit + 1) * width], map, square);
    }
}

/// Mean and biased variance of `count` values for each channel.
void finished_moments(const double* state, float* mean, float* var, double count, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
        const double offset = state[channels + c] / count, square = state[2 * channels + c] / count;
        mean[c] = float(state[c] + offset);
        var[c] = square < offset * offset ? 0.0f : float(square - offset * offset);
    }
}

/// out = activation(sum of the terms).
void join_terms(const Term* terms, int64_t count, int activation, float* out, int64_t images, int64_t length,
                int64_t channels, int64_t width, int threads) {
    const Map map{images, length, channels, width};
    const int64_t tile = tile_of(map);
    for_units(map, 0, threads, [&](auto, int64_t image, int64_t begin, int64_t end, float*) {
        for (int64_t at = begin; at < end; at += tile) {
            const int64_t size = std::min(tile, end - at);
            float* to = out + image * length + at;
            add_terms(terms, count, image, at, to, size, map);
            if (activation == RELU) activate_all<RELU>(to, size);
            if (activation == SILU) activate_all<SILU>(to, size);
        }
    });
}

/// The gradient of the terms' sum into `summed`, where it is wanted, and from it every term's own gradient, before its
/// activation, into `results`, and its norm's sums (2, channels), added, into `sums`; null where they are not wanted. A
/// term without a result has the gradient of the sum. y is the joined map behind ReLU.
void join_gradients(const float* grad, const float* y, const Term* terms, int64_t count, int activation, float* summed,
                    float* const* results, double* const* sums, int64_t images, int64_t length, int64_t channels,
                    int64_t width, int threads) {
    const Map map{images, length, channels, width};
    const int64_t tile = tile_of(map), units = units_of(map);
    std::vector<std::vector<double>> found(count);
    for (int64_t i = 0; i < count; ++i)
        if (sums[i]) found[i].resize(2 * units * width);
    const int64_t floats = 2 * width + 2 * tile;
    for_units(map, floats, threads, [&](int64_t unit, int64_t image, int64_t begin, int64_t end, float* s) {
        float *product = s, *plain = s + width, *z = s + 2 * width, *own = z + tile;
        std::fill(s, s + 2 * width, 0.0f);
        for (int64_t at = begin; at < end; at += tile) {
            const int64_t size = std::min(tile, end - at), first = image * length + at;
            const float* d = grad + first;
            if (activation != NONE) {
                float* to = summed ? summed + first : own;
                if (activation == RELU) {
                    inactivate_all<RELU>(y + first, d, to, size);
                } else {
                    add_terms(terms, count, image, at, z, size, map);
                    inactivate_all<SILU>(z, d, to, size);
                }
                d = to;
            }
            for (int64_t i = 0; i < count; ++i) {
                const Term& term = terms[i];
                const Norm norm(term.norm, width);
                const float* dz = d;
                if (results[i]) {
                    const float factor = term.factor ? term.factor[image] : 1.0f;
                    float* to = results[i] + first;
                    if (term.norm && term.activation == RELU)
                        through_term<RELU>(term.x + first, norm, factor, d, to, size, width);
                    else if (term.norm && term.activation == SILU)
                        through_term<SILU>(term.x + first, norm, factor, d, to, size, width);
                    else
                        multiply(d, factor, to, size);
                    dz = to;
                }
                if (!sums[i]) continue;
                sum_rows(dz, term.x + first, norm, product, plain, size, width);
                flush(product, &found[i][2 * unit * width], width);
                flush(plain, &found[i][(2 * unit + 1) * width], width);
            }
        }
    });
    for (int64_t i = 0; i < count; ++i)
        if (sums[i]) add_sums(found[i], units, Norm(terms[i].norm, width), map, sums[i]);
}

}  // extern "C"
