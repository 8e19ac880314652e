// How the skinny products are cut into tasks, and run: tiles of equal width, a preparation, work shared by threads.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "lora_lanes.h"

namespace lora_kernels {

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// `size` columns in as few tiles of at most `most` as possible, all but equal.
struct Tiles {
  int64_t size, count;
  Tiles(int64_t size, int64_t most) : size(size), count(ceil_div(size, most)) {}
  int64_t first(int64_t tile) const { return tile * size / count; }
};

template <class Job>
struct Preparation {
  const Job& job;
  template <class L>
  LK_HD void group(int64_t item, int, void*) const {
    job.template prepare<WideOf<L>>(item);
  }
};
template <class Job>
struct Work {
  const Job& job;
  template <class L>
  LK_HD void group(int64_t item, int, void* scratch) const {
    job.template work<WideOf<L>>(item, static_cast<float*>(scratch));
  }
};

// All preparations, then all work, with `scratch` floats for each thread.
template <class Job>
void run(const Job& job, int64_t preparations, int64_t items, int64_t scratch, int64_t products, int threads) {
  const int bytes = lane_bytes();
  // Waking a thread takes longer than a few thousand products.
  threads = int(std::max<int64_t>(1, std::min<int64_t>({threads, items, products >> 16})));
  const Arena arena(size_t(scratch) * sizeof(float), threads);  // here, because nothing may be thrown inside
  if (threads == 1) {  // a parallel region takes longer than a small job
    for (int64_t item = 0; item < preparations; ++item) run_group(Preparation<Job>{job}, item, 1, arena.part(0), bytes);
    for (int64_t item = 0; item < items; ++item) run_group(Work<Job>{job}, item, 1, arena.part(0), bytes);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    void* const part = arena.part(omp_get_thread_num());
#else
    void* const part = arena.part(0);
#endif
#pragma omp for schedule(static)
    for (int64_t item = 0; item < preparations; ++item) run_group(Preparation<Job>{job}, item, 1, part, bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) run_group(Work<Job>{job}, item, 1, part, bytes);
  }
}

// Jobs of one kind as one job: the tasks of all follow each other.
template <class Job>
struct Batch {
  struct Member {
    Job job;
    int64_t preparations, items;  // how many there are up to its last
  };
  std::vector<Member> members;
  int64_t preparations = 0, items = 0, scratch = 0, products = 0;

  void add(const Job& job, int64_t to_prepare, int64_t to_work, int64_t multiplications) {
    members.push_back({job, preparations += to_prepare, items += to_work});
    scratch = std::max(scratch, job.scratch());
    products += multiplications;
  }
  // The job of a task, and which of its tasks it is.
  std::pair<const Job&, int64_t> owner(int64_t Member::* last, int64_t item) const {
    const auto member = std::upper_bound(members.begin(), members.end(), item,
                                         [&](int64_t item, const Member& one) { return item < one.*last; });
    return {member->job, member == members.begin() ? item : item - member[-1].*last};
  }
  template <class W>
  LK_HD void prepare(int64_t item) const {
    const auto [job, own] = owner(&Member::preparations, item);
    job.template prepare<W>(own);
  }
  template <class W>
  LK_HD void work(int64_t item, float* memory) const {
    const auto [job, own] = owner(&Member::items, item);
    job.template work<W>(own, memory);
  }
  void run_all(int threads) const { run(*this, preparations, items, scratch, products, threads); }
};

}  // namespace lora_kernels
