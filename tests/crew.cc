// A crew of two threads that believe to be on certain cores; for test_cpu_crew.py.
//
//     crew CALLER HELPER CORES
//
// CORES are those that the threads may run on. Prints what the helper asked the kernel for, a line of cores each.

#include "crew.h"

#include <sched.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>

namespace {

int core_of_caller, core_of_helper;
cpu_set_t allowed;
thread_local bool is_helper = false;
std::string asked;

struct Pool {
  std::thread thread;
  int64_t num_threads() const { return 2; }
  void Schedule(std::function<void()> work) {
    thread = std::thread([work] {
      is_helper = true;
      work();
    });
  }
};

}  // namespace

// In the place of the kernel's.
extern "C" int sched_getcpu() noexcept { return is_helper ? core_of_helper : core_of_caller; }
extern "C" int sched_getaffinity(pid_t, size_t size, cpu_set_t* cores) noexcept {
  std::memcpy(cores, &allowed, size);
  return 0;
}
extern "C" int sched_setaffinity(pid_t, size_t, const cpu_set_t* cores) noexcept {
  for (int core = 0; core < 8; ++core) asked += CPU_ISSET(core, cores) ? std::to_string(core) : "";
  asked += "\n";
  return 0;
}

int main(int, char** arguments) {
  core_of_caller = std::atoi(arguments[1]), core_of_helper = std::atoi(arguments[2]);
  CPU_ZERO(&allowed);
  for (const char* core = arguments[3]; *core; ++core) CPU_SET(*core - '0', &allowed);
  Pool pool;
  int64_t helped = 0;
  {
    bertjax::Crew crew(pool);
    while (helped == 0) {
      crew.Run(1, [&](int64_t) { helped += is_helper; });
    }
  }
  pool.thread.join();
  std::fputs(asked.c_str(), stdout);
}
