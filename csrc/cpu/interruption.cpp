#include "interruption.h"

#include <csignal>
#include <stdexcept>

#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#else
#include <pthread.h>
#endif

namespace fastcl::cpu {
namespace {

// All of these are of the process's first thread alone, and of the handler, which may run in any.
volatile std::sig_atomic_t raised = 0;
struct sigaction before;
pid_t owner = 0;  // who has put the handler there: a child that another thread forks meanwhile inherits it, and nobody to take it back

bool is_first_thread() {
#ifdef __linux__
  return getpid() == pid_t(syscall(SYS_gettid));
#else
  return pthread_main_np() != 0;
#endif
}

void note(int signal, siginfo_t* info, void* context) {
  raised = 1;
  if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(signal, info, context);
  else before.sa_handler(signal);
}

bool is_ours(const struct sigaction& action) { return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == note; }

}  // namespace

Interruption::Interruption() : first_thread_(is_first_thread()) {
  struct sigaction now;
  if (!first_thread_ || sigaction(SIGINT, nullptr, &now) != 0) return;
  if (is_ours(now) && owner == getpid()) return;  // within another call, which puts the one before back
  owner = getpid();
  raised = 0;
  if (!is_ours(now)) {
    if (!(now.sa_flags & SA_SIGINFO) && (now.sa_handler == SIG_DFL || now.sa_handler == SIG_IGN)) return;
    before = now;
    now.sa_sigaction = note;
    now.sa_flags |= SA_SIGINFO;
    if (sigaction(SIGINT, &now, nullptr) != 0) return;
  }
  ours_ = true;
}

Interruption::~Interruption() {
  struct sigaction now;
  if (ours_ && sigaction(SIGINT, nullptr, &now) == 0 && is_ours(now)) sigaction(SIGINT, &before, nullptr);
}

const volatile int* Interruption::flag() const { return first_thread_ ? &raised : nullptr; }

void Interruption::check() const {
  if (first_thread_ && raised) throw std::runtime_error("fastcl: interrupted by SIGINT");
}

}  // namespace fastcl::cpu
