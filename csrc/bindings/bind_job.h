// A ForwardJob with the memory that it works on.
#pragma once

#include <vector>

#include "bindings/bind_layer.h"
#include "bindings/release.h"
#include "serve/forward_job.h"

namespace ktmoe {

struct JobDeferral {  // as ForwardJob::Deferral
  int protected_k = 0;
  std::optional<OutArray> later;
  std::shared_ptr<class QueuedForward> earlier;
};

// A forward of CPU arrays: owns copies of the inputs, so that the caller may overwrite its own at once, and keeps the outputs alive.
class QueuedForward : public Releasable {
 public:
  QueuedForward(const char* function, std::shared_ptr<MoeLayer> layer, const ForwardArgs& args, bf16* dst, const OutArray& out,
                std::shared_ptr<LoraAdapter> lora, JobDeferral deferral);

  bool defers() const { return job_.defers(); }
  void run_now();
  void run_later() { job_.run_later(); }

 private:
  bf16* later_memory(const char* function, const ForwardArgs& args) const;
  std::size_t slots() const { return static_cast<std::size_t>(n_tokens_) * static_cast<std::size_t>(layer_->config().top_k); }
  Routing routing() const;
  ForwardJob* earlier_job() const { return deferral_.earlier ? &deferral_.earlier->job_ : nullptr; }

  const std::shared_ptr<MoeLayer> layer_;
  const std::shared_ptr<LoraAdapter> lora_;
  const OutArray out_;
  JobDeferral deferral_;
  const int n_tokens_;
  std::vector<bf16> hidden_, weights16_;
  std::vector<std::int32_t> ids32_;
  std::vector<std::int64_t> ids64_;
  std::vector<float> weights32_;
  ForwardJob job_;
};

std::shared_ptr<QueuedForward> make_job(const char* function, std::shared_ptr<MoeLayer> layer, const InArray& hidden, const InArray& ids,
                                        const InArray& weights, const OutArray& out, std::shared_ptr<LoraAdapter> lora,
                                        JobDeferral deferral);

struct OwningJob {  // what Python holds
  std::shared_ptr<QueuedForward> shared;
};

}  // namespace ktmoe
