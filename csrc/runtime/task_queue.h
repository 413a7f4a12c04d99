// TaskQueue: one FIFO of submitted work, run by one thread that starts with the first task and sleeps when there is none.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

namespace ktmoe {

class TaskQueue {
 public:
  TaskQueue();
  ~TaskQueue();  // runs what is queued, then ends the thread; in a forked child it forgets both
  TaskQueue(const TaskQueue&) = delete;
  TaskQueue& operator=(const TaskQueue&) = delete;

  class Ticket {
   public:
    void wait() const;  // rethrows what the task threw
    bool done() const;

   private:
    friend class TaskQueue;
    struct Outcome;
    std::shared_ptr<Outcome> outcome_;
  };

  Ticket submit(std::function<void()> task);  // RuntimeError after close()
  void drain();
  void close(std::chrono::duration<double> timeout);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace ktmoe
