// TaskQueue: one bounded FIFO of submitted work, run by one thread that starts with the first task and sleeps when there is none.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>

namespace ktmoe {

using Seconds = std::chrono::duration<double>;

class TaskQueue {
 public:
  explicit TaskQueue(int capacity);
  ~TaskQueue();  // the thread runs what is queued and ends; in a forked child the queue forgets both
  TaskQueue(const TaskQueue&) = delete;
  TaskQueue& operator=(const TaskQueue&) = delete;

  using Task = std::function<void()>;

  class Ticket {
   public:
    void wait() const;                     // rethrows what the task threw, or that it was cancelled
    bool wait_for(Seconds timeout) const;  // false: not done yet
    bool done() const;

   private:
    friend class TaskQueue;
    struct Outcome;
    std::shared_ptr<Outcome> outcome_;
  };

  // RuntimeError after close(), and in a child of fork.
  Ticket submit(Task task);                      // waits while `capacity` tasks wait
  std::optional<Ticket> try_submit(Task& task);  // does not: nothing is taken from `task` then
  Ticket submit_beyond_capacity(Task task);      // for the second half of what was admitted already
  bool wait_for_room(Seconds timeout);           // true: there is room, or submitting will throw

  int capacity() const;
  bool drain(Seconds timeout);  // true: every task has run
  // Refuses what comes later. What has not begun when the time is over is cancelled; what is running then runs to its end.
  void close(Seconds timeout);

 private:
  struct State;
  Ticket push(Task& task);  // under the lock
  std::shared_ptr<State> state_;
};

}  // namespace ktmoe
