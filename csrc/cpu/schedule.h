// Who sweeps what, when. Supersteps follow one another; within one, no two threads touch the same rows or the same
// columns, so that sums need no private copies, no atomics, and come out bitwise the same for a thread count.
//
//     x against y      thread t owns rows t, and sees columns (t + s) mod T in superstep s
//     x with itself    a round-robin tournament of 2T ranges of rows: every pair of ranges meets once, then each
//                      range meets itself
#pragma once

#include "microkernel.h"
#include "range.h"
#include "task.h"

namespace fastcl::cpu::FASTCL_ISA {

FASTCL_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTCL_INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
FASTCL_INLINE int64_t parts_of(int64_t length, int64_t size) { return (length + size - 1) / size; }

// Where part k of `parts` begins, in whole units.
FASTCL_INLINE int64_t cut(int64_t length, int64_t unit, int64_t k, int64_t parts) {
  return smaller_of(length, parts_of(length, unit) * k / parts * unit);
}

struct Block {
  int64_t row_begin, row_end, col_begin, col_end;
  bool triangle;  // rows and columns are the same range of x: only tiles on and above the diagonal
};

// The fewest flops that are worth waking another thread for.
inline constexpr int64_t flops_per_thread = 1 << 19;

template <class T>
int threads_for(const Task<T>& task, int available) {
  using G = Geometry<T>;
  const double flops = 2.0 * task.x.count * task.y.count * (task.d + 8);
  int64_t threads = smaller_of(available, larger_of(1, int64_t(flops / flops_per_thread)));
  const int64_t units = task.self ? parts_of(task.x.count, G::unit) / 2 : parts_of(task.x.count, G::rows);
  return int(larger_of(1, smaller_of(threads, units)));
}

template <class T>
class Schedule {
  using G = Geometry<T>;
  int64_t n_, m_;
  bool self_, shared_columns_;
  int threads_;

  int64_t row_cut(int64_t k) const { return cut(n_, G::rows, k, threads_); }
  int64_t col_cut(int64_t k) const { return cut(m_, G::unit, k, threads_); }
  int64_t seat_cut(int64_t k) const { return cut(n_, G::unit, k, 2 * threads_); }

 public:
  // shared_columns: something is summed over rows, so that two threads must not meet in a column.
  Schedule(const Task<T>& task, int threads, bool shared_columns)
      : n_(task.x.count), m_(task.y.count), self_(task.self), shared_columns_(shared_columns), threads_(threads) {}

  int threads() const { return threads_; }
  int steps() const {
    if (self_) return threads_ == 1 ? 1 : 2 * threads_;
    return shared_columns_ ? threads_ : 1;
  }

  // What a thread sweeps in a superstep; call `sweep` with each block.
  template <class Sweep>
  void visit(int step, int thread, Sweep sweep) const {
    if (!self_) {
      if (!shared_columns_) return sweep(Block{row_cut(thread), row_cut(thread + 1), 0, m_, false});
      const int part = (thread + step) % threads_;
      return sweep(Block{row_cut(thread), row_cut(thread + 1), col_cut(part), col_cut(part + 1), false});
    }
    if (threads_ == 1) return sweep(Block{0, n_, 0, n_, true});
    const int seats = 2 * threads_, rounds = seats - 1;
    if (step == rounds) {
      for (int seat = 2 * thread; seat < 2 * thread + 2; seat++)
        sweep(Block{seat_cut(seat), seat_cut(seat + 1), seat_cut(seat), seat_cut(seat + 1), true});
      return;
    }
    int a = rounds, b = step;
    if (thread > 0) a = (step + thread) % rounds, b = (step - thread + rounds) % rounds;
    if (a > b) { const int swapped = a; a = b; b = swapped; }
    sweep(Block{seat_cut(a), seat_cut(a + 1), seat_cut(b), seat_cut(b + 1), false});
  }
};

// Runs body(0), ..., body(tasks - 1) on the host's threads.
template <class Body>
void parallel(const Host& host, int tasks, Body body) {
  host.parallel(host.self, tasks, [](void* argument, int task) { (*static_cast<Body*>(argument))(task); }, &body);
}

// What a thread sets up before it multiplies T, and gives back. Not a constructor and a destructor: an object that may have to be
// unwound leaves a weak symbol in every set's objects, and nothing in a task throws.
template <class T>
struct Registers {
  static FASTCL_INLINE void take() {}
  static FASTCL_INLINE void release() {}
};

// Runs body(0), ..., body(tasks - 1) on the host's threads, each with its registers.
template <class T, class Body>
void parallel_products(const Host& host, int tasks, Body body) {
  parallel(host, tasks, [&](int task) {
    Registers<T>::take();
    body(task);
    Registers<T>::release();
  });
}

template <class U>
U* allocate(const Host& host, int64_t count) {
  return static_cast<U*>(host.allocate(host.self, size_t(count) * sizeof(U)));
}

}  // namespace fastcl::cpu::FASTCL_ISA
