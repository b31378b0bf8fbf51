// The machine of device.h on the host. Every thread of a CTA, and of all CTAs that run together, is a fiber that runs
// until it waits. Between two barriers the fibers run in ascending or in descending order, so that a barrier that is
// missing changes results; one that not all threads reach, lanes that meet in different warp operations, and threads
// that all spin are errors.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace spectral_kernels::device {

enum class Order { kAscending, kDescending };

class Machine {
 public:
  /// Runs body(shared memory) in `blocks` CTAs of `threads` threads, `together` of them at a time.
  static void launch(int blocks, int together, int threads, size_t shared, Order order,
                     const std::function<void(unsigned char*)>& body) {
    if (threads % kLanes != 0 || blocks % together != 0) throw std::logic_error("emulation: bad launch");
    for (int first = 0; first < blocks; first += together) {
      Machine machine(first, together, threads, shared, order, body);
      current() = &machine;
      machine.run();
      current() = nullptr;
    }
  }

  static Machine& the() { return *current(); }

  int thread() const { return running_ % threads_; }
  int block() const { return first_ + place(); }

  void block_barrier() { meet(blocks_[static_cast<size_t>(place())], 1); }

  /// Lets the others run.
  void spin() {
    Fiber& fiber = fibers_[static_cast<size_t>(running_)];
    fiber.spins = true;
    leave(fiber);
  }

  /// What each lane of the warp passes, by lane. Two sets of slots in turn: none is written while it may be read.
  template <class T>
  const T* exchange(const T& value, int operation) {
    static_assert(sizeof(T) <= 8);
    Warp& warp = warps_[static_cast<size_t>(running_ / kLanes)];
    const int lane = running_ % kLanes;
    unsigned char* const slots = warp.slots[warp.barrier.generation % 2];
    reinterpret_cast<T*>(slots)[lane] = value;
    meet(warp.barrier, operation);
    return reinterpret_cast<const T*>(slots);
  }

 private:
  static constexpr int kLanes = 32;
  static constexpr size_t kStack = 64 * 1024;

  struct Barrier {
    int size, arrived = 0, operation = 0;
    unsigned generation = 0;
  };
  struct Warp {
    Barrier barrier{kLanes};
    alignas(16) unsigned char slots[2][8 * kLanes];
  };
  struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool started = false, done = false, spins = false;
    const Barrier* waits = nullptr;
    unsigned generation = 0;
    void* fake_stack = nullptr;
  };

  /// Of the running thread's CTA among those that run together.
  int place() const { return running_ / threads_; }

  Machine(int first, int together, int threads, size_t shared, Order order,
          const std::function<void(unsigned char*)>& body)
      : first_(first),
        threads_(threads),
        order_(order),
        body_(body),
        blocks_(static_cast<size_t>(together), Barrier{threads}),
        warps_(static_cast<size_t>(together * threads / kLanes)),
        fibers_(static_cast<size_t>(together * threads)) {
    for (int i = 0; i < together; ++i) {
      memory_.emplace_back(new (std::align_val_t{128}) unsigned char[shared + 1]);
      // NaN in float and double alike: what nobody wrote is seen
      for (size_t byte = 0; byte < shared; ++byte) memory_.back().get()[byte] = 0xff;
    }
    stacks_ = static_cast<unsigned char*>(mmap(nullptr, kStack * fibers_.size(), PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Machine() { munmap(stacks_, kStack * fibers_.size()); }

  static Machine*& current() {
    static Machine* machine = nullptr;
    return machine;
  }

  void run() {
    const int warps = static_cast<int>(warps_.size());
    int left = static_cast<int>(fibers_.size()), idle = 0;
    while (left > 0) {
      bool progress = false, spinning = false;
      for (int i = 0; i < warps; ++i) {
        const int warp = order_ == Order::kAscending ? i : warps - 1 - i;
        for (bool moved = true; moved;) {
          moved = false;
          for (int j = 0; j < kLanes; ++j) {
            const int lane = order_ == Order::kAscending ? j : kLanes - 1 - j;
            Fiber& fiber = fibers_[static_cast<size_t>(warp * kLanes + lane)];
            if (fiber.done || fiber.spins || (fiber.waits != nullptr && fiber.waits->generation == fiber.generation))
              continue;
            running_ = warp * kLanes + lane;
            enter(fiber);
            if (!error_.empty()) throw std::runtime_error(error_);
            if (fiber.spins) continue;
            moved = progress = true;
            left -= fiber.done;
          }
        }
        for (int j = 0; j < kLanes; ++j) {
          Fiber& fiber = fibers_[static_cast<size_t>(warp * kLanes + j)];
          spinning |= fiber.spins;
          fiber.spins = false;
        }
      }
      // what a thread spins for may have been written after it looked: it looks once more
      idle = progress ? 0 : idle + 1;
      if (!progress && !spinning) throw std::runtime_error("emulation: a barrier that not every thread reaches");
      if (idle == 2) throw std::runtime_error("emulation: all threads wait for one another");
    }
  }

  void meet(Barrier& barrier, int operation) {
    if (barrier.arrived == 0) barrier.operation = operation;
    if (barrier.operation != operation) fail("emulation: lanes of a warp meet in different operations");
    Fiber& fiber = fibers_[static_cast<size_t>(running_)];
    fiber.generation = barrier.generation;
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    fiber.waits = &barrier;
    leave(fiber);
    fiber.waits = nullptr;
  }

  void fail(const char* what) {
    error_ = what;
    leave(fibers_[static_cast<size_t>(running_)]);
  }

  static void start() {
    Machine& machine = the();
    Fiber& fiber = machine.fibers_[static_cast<size_t>(machine.running_)];
    machine.entered(fiber);
    try {
      machine.body_(machine.memory_[static_cast<size_t>(machine.place())].get());
    } catch (const std::exception& error) {
      machine.error_ = error.what();
    }
    fiber.done = true;
    machine.leave(fiber);
  }

#if defined(__SANITIZE_ADDRESS__)
  // the sanitizer must be told of every change of stacks
  void enter(Fiber& fiber) {
    unsigned char* const stack = stacks_ + kStack * static_cast<size_t>(running_);
    if (!fiber.started) prepare(fiber);
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack, kStack);
    swapcontext(&scheduler_context_, &fiber.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  }
  void entered(Fiber& fiber) { __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack_, &scheduler_size_); }
  void leave(Fiber& fiber) {
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, scheduler_stack_, scheduler_size_);
    swapcontext(&fiber.context, &scheduler_context_);
    entered(fiber);
  }
#else
  // a context switch saves the signal mask, a system call each; a jump does not
  void enter(Fiber& fiber) {
    if (_setjmp(scheduler_place_) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    prepare(fiber);
    setcontext(&fiber.context);
  }
  void entered(Fiber&) {}
  void leave(Fiber& fiber) {
    if (_setjmp(fiber.place) == 0) _longjmp(scheduler_place_, 1);
  }
#endif

  void prepare(Fiber& fiber) {
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks_ + kStack * static_cast<size_t>(running_);
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Machine::start, 0);
  }

  struct Free {
    void operator()(unsigned char* memory) const { ::operator delete[](memory, std::align_val_t{128}); }
  };

  const int first_, threads_;
  const Order order_;
  const std::function<void(unsigned char*)>& body_;
  std::vector<Barrier> blocks_;
  std::vector<Warp> warps_;
  std::vector<Fiber> fibers_;
  std::vector<std::unique_ptr<unsigned char[], Free>> memory_;
  unsigned char* stacks_ = nullptr;
  int running_ = 0;
  std::string error_;
  jmp_buf scheduler_place_;
  ucontext_t scheduler_context_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
};

inline int thread_index() { return Machine::the().thread(); }
inline int block_index() { return Machine::the().block(); }
inline void barrier() { Machine::the().block_barrier(); }
inline void warp_barrier() { Machine::the().exchange(0, 5); }
inline void spin() { Machine::the().spin(); }

template <class T>
T* pinned(T* pointer) {
  return pointer;
}

inline void send(Mail* to, const Mail& mail) { *to = mail; }
inline Mail receive(const Mail* from) { return *from; }
inline void arrive(unsigned* counter) { ++*counter; }
inline unsigned arrived(const unsigned* counter) { return *counter; }

template <class T>
T shuffle(T value, int lane) {
  return Machine::the().exchange(value, 1)[lane % 32];
}

template <class T>
T shuffle_xor(T value, int mask) {
  const int lane = Machine::the().thread() % 32;
  return Machine::the().exchange(value, 100 + mask)[lane ^ mask];
}

inline unsigned ballot(bool vote) {
  const int* const votes = Machine::the().exchange(static_cast<int>(vote), 2);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(votes[lane]) << lane;
  return bits;
}

inline uint32_t warp_max(uint32_t value) {
  const uint32_t* const values = Machine::the().exchange(value, 3);
  return *std::max_element(values, values + 32);
}

inline uint32_t warp_min(uint32_t value) {
  const uint32_t* const values = Machine::the().exchange(value, 4);
  return *std::min_element(values, values + 32);
}

inline void note(int64_t* word, int64_t value) {
  if (value < *word) *word = value;
}

inline void lower_to(int* place, int value) { *place = std::min(*place, value); }

inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }
inline int lowest_bit(unsigned bits) { return __builtin_ctz(bits); }

}  // namespace spectral_kernels::device
