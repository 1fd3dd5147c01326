// Work shared among the threads of torch's OpenMP, item by item.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <omp.h>

#include <atomic>
#include <vector>

namespace longcat {

constexpr long WORTH_A_THREAD = 1 << 14;  // numbers, of which each takes an operation or two

// Calls work(item) once for each of `items`, from any thread: each has items of its own that follow each other, as memory
// is quickest in order, and helps the next ones when it is done.
template <class Work>
void for_each(long items, Work work) {
    const int threads = items < omp_get_max_threads() ? int(items) : omp_get_max_threads();
    if (threads <= 1) {
        for (long item = 0; item < items; item++) work(item);
        return;
    }
    struct alignas(64) Next {
        std::atomic<long> item;
    };
    std::vector<Next> next(threads);
    for (int i = 0; i < threads; i++) next[i].item = items * i / threads;
#pragma omp parallel num_threads(threads)
    {
        const int self = omp_get_thread_num();
        for (int i = 0; i < threads; i++) {
            const int whose = (self + i) % threads;
            const long end = items * (whose + 1) / threads;
            for (long item; (item = next[whose].item.fetch_add(1)) < end;) work(item);
        }
    }
}

}  // namespace longcat
