#include "serve/stream_forward.h"

#include <unistd.h>

#include <algorithm>
#include <unordered_map>

namespace ktmoe {
namespace {

constexpr std::uintptr_t kSteps = 4;  // data of a host function = number * kSteps + step

// All that were launched and still exist. Leaked: the driver's threads may look something up at any time, exit included.
struct Table {
  struct Entry {
    std::weak_ptr<StreamForward> forward;
    std::shared_ptr<StreamForward> kept;  // while `launched` steps have not run
    int launched = 0;
  };
  std::mutex mutex;
  std::unordered_map<std::uintptr_t, Entry> entries;
  std::uintptr_t last = 0;
  bool missed = false;  // a graph ran a step of one that is gone
  const pid_t owner = getpid();

  void has_run(Entry& entry) {
    if (--entry.launched == 0) entry.kept.reset();
  }

  static Table& get() {
    static Table* const self = new Table;
    return *self;
  }
};

std::exception_ptr with_place(const std::exception_ptr& error, const std::string& where) {
  try {
    try {
      std::rethrow_exception(error);
    } catch (const Error& e) {
      return std::make_exception_ptr(Error(e.kind, where + ": " + e.what()));
    }
  } catch (...) {  // another error, or no memory for the text
    return error;
  }
}

}  // namespace

void StreamErrors::put(const std::exception_ptr& error, const std::string& where) {
  const std::lock_guard guard(mutex_);
  if (!first_) first_ = with_place(error, where);
}

std::exception_ptr StreamErrors::take() {
  {
    const std::lock_guard guard(mutex_);
    if (first_) return std::exchange(first_, nullptr);
  }
  Table& table = Table::get();
  const std::lock_guard guard(table.mutex);
  if (!std::exchange(table.missed, false)) return nullptr;
  return std::make_exception_ptr(
      Error(ErrorKind::runtime,
            "[forward] a CUDA graph ran a forward that is gone: the layer was freed or loaded again, or the buffers were "
            "cleared, after the capture"));
}

StreamForward::StreamForward(std::shared_ptr<TaskQueue> queue, std::shared_ptr<StreamErrors> errors, std::string name,
                             const MoeLayer& layer, const LoraAdapter* lora, const Memory& memory, int protected_k,
                             std::shared_ptr<StreamForward> earlier, Life life)
    : queue_(std::move(queue)),
      errors_(std::move(errors)),
      name_(std::move(name)),
      memory_(memory),
      hidden_(layer.config().hidden),
      earlier_(std::move(earlier)),
      life_(life),
      job_(layer, lora, {memory.hidden, hidden_}, memory.routing, memory.out,
           {protected_k, memory.later, earlier_ ? &earlier_->job_ : nullptr}) {}

StreamForward::~StreamForward() {
  Table& table = Table::get();
  if (!number_ || table.owner != getpid()) return;  // in a child of fork the lock may be held for ever
  const std::lock_guard guard(table.mutex);
  table.entries.erase(number_);
}

void StreamForward::launch(const std::shared_ptr<StreamForward>& self, Step step, CudaStream stream) {
  Table& table = Table::get();
  const bool runs = self->life_ != Life::captured;
  {
    const std::lock_guard guard(table.mutex);
    if (!self->number_) self->number_ = ++table.last;
    Table::Entry& entry = table.entries[self->number_];
    entry.forward = self;
    if (runs) {
      entry.kept = self;
      ++entry.launched;
    }
  }
  const std::uintptr_t data = self->number_ * kSteps + static_cast<std::uintptr_t>(step);
  try {
    launch_host_function(stream, &StreamForward::on_stream, reinterpret_cast<void*>(data));
  } catch (...) {
    const std::lock_guard guard(table.mutex);
    if (runs) table.has_run(table.entries[self->number_]);
    throw;
  }
}

void StreamForward::on_stream(void* data) {
  const auto number = reinterpret_cast<std::uintptr_t>(data);
  std::shared_ptr<StreamForward> self;
  {
    Table& table = Table::get();
    const std::lock_guard guard(table.mutex);
    const auto found = table.entries.find(number / kSteps);
    if (found != table.entries.end()) self = found->second.forward.lock();
    if (!self) {
      table.missed = true;
      return;
    }
    if (self->life_ != Life::captured) table.has_run(found->second);
  }
  switch (static_cast<Step>(number % kSteps)) {
    case Step::start:
      return self->start(self);
    case Step::wait:
      return self->wait_for(self->now_, self->memory_.out);
    case Step::wait_later:
      return self->wait_for(self->later_, self->memory_.later);
    case Step::settle:
      return self->settle();
  }
}

void StreamForward::start(const std::shared_ptr<StreamForward>& self) {
  const std::lock_guard guard(mutex_);
  now_.reset();
  later_.reset();
  not_started_ = nullptr;
  try {
    const int n = __atomic_load_n(memory_.n_tokens, __ATOMIC_RELAXED);
    require(n >= 0 && n <= memory_.rows, ErrorKind::value, "[forward] batch size: got ", n, ", expected 0 to ", memory_.rows);
    now_ = queue_->submit([self, n] { self->run_now(n); });
    if (memory_.later) later_ = queue_->submit_beyond_capacity([self, n] { self->run_later(n); });
  } catch (...) {
    not_started_ = std::current_exception();
  }
}

void StreamForward::run_now(int n_tokens) {
  job_.run_now(n_tokens);
  clear_rows(memory_.out, n_tokens);
  if (life_ != Life::once) return;
  job_.forget_earlier();
  earlier_.reset();
}

void StreamForward::run_later(int n_tokens) {
  job_.run_later();
  clear_rows(memory_.later, n_tokens);
}

void StreamForward::clear_rows(bf16* rows, int from) const {
  const auto at = [&](int row) { return rows + static_cast<std::ptrdiff_t>(row) * hidden_; };
  std::fill(at(from), at(memory_.rows), bf16{0});
}

void StreamForward::wait_for(const std::optional<TaskQueue::Ticket>& ticket, bf16* result) {
  const std::lock_guard guard(mutex_);
  try {
    if (not_started_) std::rethrow_exception(not_started_);
    require(ticket.has_value(), ErrorKind::runtime, "[forward] the stream waits for a forward that it has not started");
    ticket->wait();
  } catch (...) {
    const std::ptrdiff_t n = static_cast<std::ptrdiff_t>(memory_.rows) * hidden_;
    std::fill(result, result + n, bf16{0x7fc0});  // NaN
    errors_->put(std::current_exception(), name_);
  }
}

void StreamForward::settle() {
  const std::lock_guard guard(mutex_);
  for (const auto* ticket : {&now_, &later_}) {
    try {
      if (*ticket) (*ticket)->wait();
    } catch (...) {  // nobody will look at the result
    }
  }
}

}  // namespace ktmoe
