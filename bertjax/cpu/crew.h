// Sharing work between threads: one crew for all steps of an encoder.

#pragma once

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <thread>

namespace bertjax {

// The calling thread and those of a pool that happen to be free. An encoder has some seventy short steps, so a helper
// is asked for once and then waits for the next step by spinning. The caller takes part in every step and waits for
// tasks, not for threads: a helper that never comes costs speed, but nothing else.
class Crew {
 public:
  // `Pool` has num_threads() and Schedule(function), as xla::ffi::ThreadPool has. Throws std::bad_alloc.
  template <class Pool>
  explicit Crew(Pool& pool) : Crew(std::max<int64_t>(1, pool.num_threads())) {
    for (int64_t i = 1; i < threads; ++i) {
      // A pool whose queue is full runs the function at once, on this thread, which would then wait for itself.
      pool.Schedule([state = state_, caller = std::this_thread::get_id()] {
        if (std::this_thread::get_id() != caller) state->Help();
      });
    }
  }
  ~Crew() { state_->ticket.store(kDone, std::memory_order_release); }
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  static constexpr int64_t kMostTasks = int64_t(1) << 24;
  // Runs work(0), ..., work(tasks - 1) in any order and returns when all are done; less than kMostTasks. Throws
  // std::bad_alloc if any of them did; they may throw nothing else.
  void Run(int64_t tasks, const std::function<void(int64_t)>& work) {
    State& state = *state_;
    state.work.store(&work, std::memory_order_relaxed);
    state.finished.store(0, std::memory_order_relaxed);
    state.ticket.store((++step_ & 0x7fff) << 48 | uint64_t(tasks) << 24, std::memory_order_release);
    while (state.Take()) {
    }
    for (int spins = 0; state.finished.load(std::memory_order_acquire) < tasks;) Wait(spins);
    if (state.failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
  }

  const int64_t threads;

 private:
  // A constructor of its own, so that helpers are sent home if asking for another one throws.
  explicit Crew(int64_t threads) : threads(threads), state_(std::make_shared<State>()) {}

  static constexpr uint64_t kDone = ~uint64_t(0);
  // About 0.5 ms; whoever waits for longer lets other threads have the core.
  static constexpr int kSpins = 20000;

  static void Wait(int& spins) {
    if (++spins < kSpins) {
      _mm_pause();
    } else {
      sched_yield();
    }
  }

  struct State {
    // Step (16 bits), number of tasks (24 bits), next task (24 bits). They are one number so that a task is taken only
    // of the step whose end was looked at, and `work` is then that step's too.
    std::atomic<uint64_t> ticket{0};
    std::atomic<int64_t> finished{0};
    std::atomic<bool> failed{false};
    std::atomic<const std::function<void(int64_t)>*> work{nullptr};
    const int core = sched_getcpu();  // the caller's, who makes this

    bool Take() {
      uint64_t current = ticket.load(std::memory_order_acquire);
      while (current != kDone) {
        const int64_t task = current & 0xffffff, tasks = (current >> 24) & 0xffffff;
        if (task >= tasks) return false;
        const auto* todo = work.load(std::memory_order_relaxed);
        if (ticket.compare_exchange_weak(current, current + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
          try {
            (*todo)(task);
          } catch (const std::bad_alloc&) {
            failed.store(true, std::memory_order_relaxed);
          }
          finished.fetch_add(1, std::memory_order_release);
          return true;
        }
      }
      return false;
    }

    // A helper that is woken while all cores are busy may be put on the caller's, and stays there when another one
    // falls idle a moment later: the two then take turns, and the call takes as long as it does alone.
    void LeaveCore() const {
      cpu_set_t all;
      if (sched_getcpu() != core || sched_getaffinity(0, sizeof(all), &all) != 0) return;
      cpu_set_t others = all;
      CPU_CLR(core, &others);
      if (CPU_COUNT(&others) == 0) return;
      // Moved by the first call, it is free to be moved again after the second.
      sched_setaffinity(0, sizeof(others), &others);
      sched_setaffinity(0, sizeof(all), &all);
    }

    void Help() {
      LeaveCore();
      for (int spins = 0; ticket.load(std::memory_order_acquire) != kDone;) {
        if (Take()) {
          spins = 0;
        } else {
          Wait(spins);
        }
      }
    }
  };

  std::shared_ptr<State> state_;
  uint64_t step_ = 0;
};

}  // namespace bertjax
