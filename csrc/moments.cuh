// Mean and centred sum of squares of some values, merged by the formula of T. Chan, G. Golub and R. LeVeque, "Updating
// formulae and a pairwise algorithm", 1979: a mean far from zero costs no digits.
#pragma once

#include <primitives.cuh>

struct Moments {
    float count, mean, squares;
};

// Adds other values to some.
DEVICE void merge(Moments& some, Moments others) {
    if (others.count == 0.0f) return;
    float count = some.count + others.count, share = others.count / count, difference = others.mean - some.mean;
    some.mean += difference * share;
    some.squares += others.squares + difference * difference * some.count * share;
    some.count = count;
}
