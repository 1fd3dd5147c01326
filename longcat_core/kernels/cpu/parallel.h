// Work shared among the threads of torch's OpenMP, item by item.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <omp.h>

#include <atomic>

namespace longcat {

constexpr long WORTH_A_THREAD = 1 << 14;  // numbers, of which each takes an operation or two

// Calls work(item) once for each of `items`, from any thread.
template <class Work>
void for_each(long items, Work work) {
    const int threads = items < omp_get_max_threads() ? int(items) : omp_get_max_threads();
    if (threads <= 1) {
        for (long item = 0; item < items; item++) work(item);
        return;
    }
    std::atomic<long> next{0};
#pragma omp parallel num_threads(threads)
    for (long item; (item = next.fetch_add(1)) < items;) work(item);
}

}  // namespace longcat
