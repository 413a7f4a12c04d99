// StreamForward: a ForwardJob that a CUDA stream starts and waits for, by host functions.
//
// These run on a thread of the driver: they call no CUDA, never take the GIL and let no exception out. An error fills the result with
// NaN and goes to StreamErrors, where Python finds it. A captured graph runs them again and again, so nothing in a StreamForward changes
// between runs but its tickets. What the driver holds is a number, not a pointer: what was launched keeps its StreamForward alive until
// it has run, but a graph does not, and one that outlives a StreamForward only leaves an error.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "runtime/cuda_stream.h"
#include "runtime/task_queue.h"
#include "serve/forward_job.h"

namespace ktmoe {

class StreamErrors {
 public:
  void put(const std::exception_ptr& error, const std::string& where);  // the first one stays
  std::exception_ptr take();                                            // null: none

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

class StreamForward {
 public:
  struct Memory {                  // host memory that the stream copies to and from
    const std::int32_t* n_tokens;  // read when the stream starts the forward
    int rows;                      // of everything else: at most so many tokens
    const bf16* hidden;            // [rows][hidden]
    Routing routing;               // n_tokens not used
    bf16* out;                     // [rows][hidden]; zeros behind n_tokens
    bf16* later;                   // the same for the deferred experts, or null
  };
  enum class Step : std::uintptr_t {
    start,       // puts the job into the queue
    wait,        // until `out` is there
    wait_later,  // until `later` is there
    settle,      // until the memory is no longer used
  };

  enum class Life {
    once,      // runs a single time and lets `earlier` go then
    kept,      // runs whenever it is launched
    captured,  // is launched into graphs, which run it
  };
  StreamForward(std::shared_ptr<TaskQueue> queue, std::shared_ptr<StreamErrors> errors, std::string name, const MoeLayer& layer,
                const LoraAdapter* lora, const Memory& memory, int protected_k, std::shared_ptr<StreamForward> earlier, Life life);
  ~StreamForward();
  StreamForward(const StreamForward&) = delete;
  StreamForward& operator=(const StreamForward&) = delete;

  // `self` owns this and its memory; the queue shares it as long as a task of it is there.
  static void launch(const std::shared_ptr<StreamForward>& self, Step step, CudaStream stream);

 private:
  static void on_stream(void* data);
  void start(const std::shared_ptr<StreamForward>& self);
  void run_now(int n_tokens);
  void run_later(int n_tokens);
  void wait_for(const std::optional<TaskQueue::Ticket>& ticket, bf16* result);
  void settle();
  void clear_rows(bf16* rows, int from) const;

  const std::shared_ptr<TaskQueue> queue_;
  const std::shared_ptr<StreamErrors> errors_;
  const std::string name_;
  const Memory memory_;
  const int hidden_;
  std::shared_ptr<StreamForward> earlier_;
  const Life life_;
  ForwardJob job_;
  std::uintptr_t number_ = 0;  // in the table of all, from the first launch on

  std::mutex mutex_;
  std::optional<TaskQueue::Ticket> now_, later_;
  std::exception_ptr not_started_;
};

}  // namespace ktmoe
