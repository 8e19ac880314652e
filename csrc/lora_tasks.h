// How the skinny products are cut into tasks, and run: tiles of equal width, and phases of work shared by threads.
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

// Tasks in phases, the preparations of all jobs first: those of a phase run in any order, shared by threads, and a phase
// begins when the one before it has ended. A thread is woken, and waited for, once for all of them.
class Phases {
 public:
  // A job, which must outlive `run`: it works in phase 1 or later.
  template <class Job>
  void add(int phase, const Job& job, int64_t preparations, int64_t items, int64_t products) {
    push(0, &task<Preparation<Job>, Job>, &job, preparations);
    push(phase, &task<Work<Job>, Job>, &job, items);
    scratch_ = std::max(scratch_, job.scratch());
    products_ += products;
  }
  void run(int threads) const {
    const int bytes = lane_bytes();
    int64_t most = 0;
    for (const Phase& phase : phases_) most = std::max(most, phase.items);
    // Waking a thread takes longer than a few thousand products.
    threads = int(std::max<int64_t>(1, std::min<int64_t>({threads, most, products_ >> 16})));
    const Arena arena(size_t(scratch_) * sizeof(float), threads);  // here, because nothing may be thrown inside
    if (threads == 1) {  // a parallel region takes longer than a small job
      for (const Phase& phase : phases_)
        for (const Tasks& tasks : phase.tasks)
          for (int64_t item = 0; item < tasks.count; ++item) tasks.run(tasks.job, item, arena.part(0), bytes);
      return;
    }
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
      void* const part = arena.part(omp_get_thread_num());
#else
      void* const part = arena.part(0);
#endif
      for (const Phase& phase : phases_) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < phase.items; ++item) phase.run(item, part, bytes);
      }
    }
  }

 private:
  struct Tasks {
    void (*run)(const void* job, int64_t item, void* scratch, int bytes);
    const void* job;
    int64_t first, count;  // in the phase
  };
  struct Phase {
    std::vector<Tasks> tasks;
    int64_t items = 0;

    void run(int64_t item, void* scratch, int bytes) const {
      const auto after = std::upper_bound(tasks.begin(), tasks.end(), item,
                                          [](int64_t item, const Tasks& one) { return item < one.first; });
      const Tasks& owner = after[-1];
      owner.run(owner.job, item - owner.first, scratch, bytes);
    }
  };
  Phase phases_[4];
  int64_t scratch_ = 0, products_ = 0;

  template <class Step, class Job>
  static void task(const void* job, int64_t item, void* scratch, int bytes) {
    run_group(Step{*static_cast<const Job*>(job)}, item, 1, scratch, bytes);
  }
  void push(int phase, void (*run)(const void*, int64_t, void*, int), const void* job, int64_t count) {
    if (count == 0) return;
    phases_[phase].tasks.push_back({run, job, phases_[phase].items, count});
    phases_[phase].items += count;
  }
};

}  // namespace lora_kernels
