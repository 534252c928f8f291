// Whether threads help the one that calls a program, by how long its calls took.

#pragma once

#include <atomic>
#include <ctime>

namespace {

/// Seconds: those that go by, and those in which this thread has a core.
struct Times {
    double wall, cpu;
};

inline double seconds(clockid_t clock) {
    timespec time;
    clock_gettime(clock, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

inline Times now() { return {seconds(CLOCK_MONOTONIC), seconds(CLOCK_THREAD_CPUTIME_ID)}; }

/// Threads wait for each other at each step. Where other work takes the cores, each wait may cost a time slice, and one
/// thread alone be faster: then what was faster is done, and the other in one call of eight.
class Pace {
public:
    bool helped() {
        if (crowded <= 0) return true;
        const bool faster = alone > 0 && together <= alone;
        return ++calls % 8 ? faster : !faster;
    }

    void add(bool helped, Times took) {
        std::atomic<float>& mean = helped ? together : alone;
        mean = mean > 0 ? mean + 0.5f * (float(took.wall) - mean) : float(took.wall);
        if (!helped) return;
        if (took.cpu > 0.75 * took.wall) {
            disturbed = 0;
            if (crowded > 0) crowded--;
        } else if (++disturbed >= 3) {  // and not by what ends at once, such as the threads of another library
            crowded = 4;
        }
    }

private:
    std::atomic<int> disturbed{0};  // calls one after another
    std::atomic<int> crowded{0};    // undisturbed calls until no other work is expected
    std::atomic<float> together{0}, alone{0};
    std::atomic<unsigned> calls{0};
};

}  // namespace
