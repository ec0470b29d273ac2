// Ctrl-C while kernels run.
#pragma once

namespace fastcl::cpu {

// Python's handler of SIGINT only takes a note, which the interpreter reads once a call has returned: for 65,536 rows after half a
// minute. While the process's first thread, where Python's handlers run, is in a call, a handler of ours raises a flag that the
// tiles look at, and has Python's take its note. Nothing is done where Python (or whoever calls) does not handle SIGINT, nor in other
// threads, whose calls go on; and after the call the handler is what it was.
class Interruption {
  const bool first_thread_;
  bool ours_ = false;

 public:
  Interruption();
  ~Interruption();
  Interruption(const Interruption&) = delete;
  const volatile int* flag() const;  // null where nothing raises it
  // Throws std::runtime_error once the flag is up; fastcl/backends/native.py knows its text.
  void check() const;
};

}  // namespace fastcl::cpu
