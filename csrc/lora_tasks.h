// How the skinny products are cut into tasks, and run: tiles of equal width, a preparation, work shared by threads.
#pragma once

#include <algorithm>
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
  std::vector<Job> jobs;
  std::vector<int64_t> preparations{0}, items{0};  // where those of each job begin
  int64_t scratch = 0, products = 0;

  void add(const Job& job, int64_t to_prepare, int64_t to_work, int64_t multiplications) {
    jobs.push_back(job);
    preparations.push_back(preparations.back() + to_prepare);
    items.push_back(items.back() + to_work);
    scratch = std::max(scratch, job.scratch());
    products += multiplications;
  }
  static size_t owner(const std::vector<int64_t>& begins, int64_t item) {
    return size_t(std::upper_bound(begins.begin(), begins.end(), item) - begins.begin()) - 1;
  }
  template <class W>
  LK_HD void prepare(int64_t item) const {
    const size_t job = owner(preparations, item);
    jobs[job].template prepare<W>(item - preparations[job]);
  }
  template <class W>
  LK_HD void work(int64_t item, float* memory) const {
    const size_t job = owner(items, item);
    jobs[job].template work<W>(item - items[job], memory);
  }
  void run_all(int threads) const { run(*this, preparations.back(), items.back(), scratch, products, threads); }
};

}  // namespace lora_kernels
