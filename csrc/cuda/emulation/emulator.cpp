// Runs kernels on the host, one block after the other, every thread of a block a fiber of its own.
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include <ucontext.h>

#include "../kernels.cu"
#ifdef BITDIAL_MORE_KERNELS  // of the emulator's own tests
#include BITDIAL_MORE_KERNELS
#endif

namespace emulation {
namespace {
constexpr size_t STACK = 64 << 10;
constexpr int MOST_SHARED_BYTES = 48 << 10;  // what every architecture gives without being asked

struct Kernel {
  void (*run)(const void*);
  size_t args_size;
  int threads;
};
std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

enum class State { ready, at_barrier, in_warp, done };
struct Copy {
  int offset;
  const void* from;
};
struct Thread {
  std::unique_ptr<char[]> stack{new char[STACK]};
  void* sp = nullptr;
  ucontext_t context;
  State state = State::done;
  const void* instruction = nullptr;
  void* operands = nullptr;
  std::vector<Copy> copies;
};
// Who touched a byte last, and in which interval between barriers. Thread -1: several.
struct Touch {
  uint32_t written = 0, read = 0;
  int32_t writer = 0, reader = 0;
};

std::vector<Thread> threads;
int count = 0, current = 0, shared_bytes = 0, blocks[3];
const void* arguments;
const Kernel* kernel;
std::string problem;
unsigned char shared[MOST_SHARED_BYTES];
Touch shared_touch[MOST_SHARED_BYTES];
uint32_t interval = 0;
std::unordered_map<uintptr_t, std::vector<Touch>> pages;  // of 4 KiB of tensors
uint32_t launch = 0;
int global_thread_base = 0;

#if defined(__x86_64__)
void* scheduler_sp;
extern "C" void bitdial_switch(void** save, void* load);
asm(R"(
.text
.type bitdial_switch, @function
bitdial_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size bitdial_switch, .-bitdial_switch
)");
void to_scheduler() { bitdial_switch(&threads[current].sp, scheduler_sp); }
void to_thread() { bitdial_switch(&scheduler_sp, threads[current].sp); }
void body() {
  kernel->run(arguments);
  threads[current].state = State::done;
  to_scheduler();
}
void start(Thread& t) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(t.stack.get()) + STACK) & ~uintptr_t{15};
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // where body would return to: it never does; keeps the stack aligned as a call would
  *--sp = reinterpret_cast<void*>(body);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  t.sp = sp;
}
#else
ucontext_t scheduler;
void to_scheduler() { swapcontext(&threads[current].context, &scheduler); }
void to_thread() { swapcontext(&scheduler, &threads[current].context); }
void body() {
  kernel->run(arguments);
  threads[current].state = State::done;
  to_scheduler();
}
void start(Thread& t) {
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack.get();
  t.context.uc_stack.ss_size = STACK;
  makecontext(&t.context, body, 0);
}
#endif

void touch(Touch& t, uint32_t now, int who, bool write, const char* race) {
  if (t.written == now && t.writer != who) fail(race);
  if (write) {
    if (t.read == now && t.reader != who) fail(race);
    t.written = now;
    t.writer = who;
  } else {
    t.reader = t.read == now && t.reader != who ? -1 : who;
    t.read = now;
  }
}

void run_block() {
  interval++;
  for (int i = 0; i < shared_bytes; i++) shared_touch[i] = Touch{};
  for (int i = 0; i < count; i++) {
    threads[i].copies.clear();
    threads[i].state = State::ready;
    start(threads[i]);
  }
  while (problem.empty()) {
    bool ran = false;
    for (int i = 0; i < count && problem.empty(); i++) {
      // Odd intervals run the threads backwards: what works in one order only is found.
      current = interval % 2 ? count - 1 - i : i;
      if (threads[current].state == State::ready) {
        ran = true;
        to_thread();
      }
    }
    if (ran || !problem.empty()) continue;
    int waiting = 0, done = 0;
    for (int i = 0; i < count; i++) {
      waiting += threads[i].state == State::at_barrier;
      done += threads[i].state == State::done;
    }
    if (done == count) {
      for (int i = 0; i < count; i++)
        if (!threads[i].copies.empty()) problem = "a thread ends before its copies do";
      return;
    }
    if (waiting < count) {
      problem = "threads wait for others that are elsewhere or have ended";
      return;
    }
    interval++;
    for (int i = 0; i < count; i++) threads[i].state = State::ready;
  }
}
}  // namespace

int thread_index() { return current; }
int block_index(int axis) { return blocks[axis]; }
int block_threads() { return count; }

void fail(const char* what) {
  problem = what;
  to_scheduler();
  __builtin_unreachable();
}

void barrier() {
  threads[current].state = State::at_barrier;
  to_scheduler();
}

void together(const void* instruction, void* operands, void (*all)(void* const (&lanes)[32])) {
  Thread& mine = threads[current];
  mine.instruction = instruction;
  mine.operands = operands;
  mine.state = State::in_warp;
  const int first = current / 32 * 32;
  void* lanes[32];
  bool last = true;
  for (int i = 0; i < 32; i++) {
    if (first + i >= count) fail("an instruction of a whole warp in a block of other than whole warps");
    const Thread& other = threads[first + i];
    last = last && other.state == State::in_warp;
    if (other.state == State::in_warp && other.instruction != instruction) fail("lanes of a warp are at different instructions");
    if (other.state == State::done) fail("a lane of a warp has ended before the others");
    lanes[i] = other.operands;
  }
  if (!last) {
    to_scheduler();
    return;
  }
  all(lanes);
  for (int i = 0; i < 32; i++) threads[first + i].state = State::ready;
}

uint64_t products = 0;

void touch_global(const void* address, size_t size, bool write) {
  static uintptr_t number = 0;  // of the page touched last: most accesses go to it again
  static Touch* page = nullptr;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  for (size_t i = 0; i < size; i++) {
    if (page == nullptr || (at + i) >> 12 != number) {
      std::vector<Touch>& own = pages[number = (at + i) >> 12];
      if (own.empty()) own.resize(4096);
      page = own.data();
    }
    touch(page[(at + i) & 4095], launch, global_thread_base + current, write,
          "a race in a tensor: a thread touches what another one writes in the same launch");
  }
}

unsigned char* touch_shared(int offset, size_t size, bool write) {
  if (offset < 0 || offset + size > static_cast<size_t>(shared_bytes)) fail("access beyond shared memory");
  if (offset % size) fail("misaligned access to shared memory");
  for (size_t i = 0; i < size; i++) {
    Touch& t = shared_touch[offset + i];
    if (!write && !t.written) fail("shared memory is read before it is written");
    touch(t, interval, current, write, "a race in shared memory: two threads touch a byte without a barrier in between");
  }
  return shared + offset;
}

void copy_later(int shared_offset, const void* from) {
  touch_shared(shared_offset, 16, true);  // from now on others must keep away
  threads[current].copies.push_back({shared_offset, from});
}

void wait_for_copies() {
  for (const Copy& copy : threads[current].copies) std::memcpy(touch_shared(copy.offset, 16, true), copy.from, 16);
  threads[current].copies.clear();
}

void add_kernel(const char* name, void (*run)(const void*), size_t args_size, int threads_) {
  kernels()[name] = {run, args_size, threads_};
}
}  // namespace emulation

// "" or what went wrong; the text lives until the next call.
extern "C" const char* bitdial_emulate(const char* name, const int* grid, int shared, const void* args, size_t args_size) {
  using namespace emulation;
  problem.clear();
  const auto found = kernels().find(name);
  if (found == kernels().end()) return "no kernel of that name";
  kernel = &found->second;
  if (kernel->args_size != args_size) return "the arguments have another size than the kernel's";
  if (shared < 0 || shared > MOST_SHARED_BYTES) return "more shared memory than a block gets";
  shared_bytes = shared;
  arguments = args;
  count = kernel->threads;
  if (threads.size() < static_cast<size_t>(count)) threads = std::vector<Thread>(count);
  launch++;
  global_thread_base = 0;
  for (blocks[2] = 0; blocks[2] < grid[2]; blocks[2]++)
    for (blocks[1] = 0; blocks[1] < grid[1]; blocks[1]++)
      for (blocks[0] = 0; blocks[0] < grid[0]; blocks[0]++) {
        run_block();
        if (!problem.empty()) {
          problem += ", block (" + std::to_string(blocks[0]) + ", " + std::to_string(blocks[1]) + ", " + std::to_string(blocks[2]) +
                     "), thread " + std::to_string(current);
          return problem.c_str();
        }
        global_thread_base += count;
      }
  return "";
}

// Names of all kernels, one a line.
extern "C" const char* bitdial_kernels() {
  static std::string names;
  names.clear();
  for (const auto& entry : emulation::kernels()) names += entry.first + "\n";
  return names.c_str();
}

// Of a kernel by name; -1 where there is none.
extern "C" int bitdial_arguments_size(const char* name) {
  const auto found = emulation::kernels().find(name);
  return found == emulation::kernels().end() ? -1 : static_cast<int>(found->second.args_size);
}
extern "C" uint64_t bitdial_products() { return emulation::products; }
extern "C" int bitdial_threads(const char* name) {
  const auto found = emulation::kernels().find(name);
  return found == emulation::kernels().end() ? -1 : found->second.threads;
}
