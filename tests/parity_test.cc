// The same weights, tokens and dropout masks as PyTorch: the same losses, gradient norms and first gradients.
//   parity_test                 the data in tests/parity/*.json (made by tests/parity/make.py), on the CPU
//   parity_test --data F        one file of any seed
//   parity_test --target cuda   on the GPU that is here: the written-out graph in f32, and in bf16 what is the default
#include <cmath>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/compile.h"
#include "codegen/plan/gpu.h"
#include "ir/base/file.h"
#include "ir/base/hash.h"
#include "ir/base/json.h"
#include "ir/base/philox.h"
#include "ir/target.h"
#include "models/model.h"
#include "runtime/cuda/backend.h"
#include "runtime/executor.h"
#include "runtime/train/trainer.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using Json = nlohmann::json;

constexpr uint32_t kTokenTag = 0x746F6B65, kSignTag = 0x7369676E;

std::vector<std::string>& Files() {
  static auto& files = *new std::vector<std::string>;
  return files;
}
bool& OnCuda() {
  static bool on_cuda = false;
  return on_cuda;
}

// How a model runs here, and how far from PyTorch in f32 it may be, relatively.
struct Technique {
  std::string passes;
  double loss, norm, gradient;
};
std::vector<Technique> Techniques() {
  std::vector<Technique> techniques = {{"none", 1e-4, 1e-3, 1e-4}};
  if (OnCuda()) {
    techniques.push_back({"flash,chunked_loss,pad_vocab,fuse,remat:free", 1e-4, 1e-3, 1e-4});
    techniques.push_back({"bf16,flash,chunked_loss,pad_vocab,fuse,remat:free", 1e-2, 5e-2, 5e-2});
  }
  return techniques;
}

uint32_t Word(uint64_t seed, uint64_t index, uint32_t c1, uint32_t c2, uint32_t c3) {
  return Philox({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                {static_cast<uint32_t>(index / 4), c1, c2, c3})[index % 4];
}

void MakeBatch(uint64_t seed, uint32_t k, int64_t batch, int64_t sequence, int64_t vocab, std::vector<int32_t>& tokens,
               std::vector<int32_t>& labels) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < sequence; ++t) {
      const auto token = [&](int64_t at) {
        const uint64_t index = static_cast<uint64_t>(b * (sequence + 1) + at);
        return static_cast<int32_t>(Word(seed, index, k, kTokenTag, 0) % static_cast<uint32_t>(vocab));
      };
      const int64_t i = b * sequence + t;
      tokens[static_cast<size_t>(i)] = token(t);
      labels[static_cast<size_t>(i)] = i % 13 == 6 ? -1 : token(t + 1);
    }
  }
}

// The relative L2 distance of a gradient from PyTorch's, estimated from projections on random signs.
double GradientError(uint64_t seed, const std::string& name, absl::Span<const double> gradient, const Json& expected) {
  const uint64_t hash = Fnv1a(name);
  double sum = 0;
  const std::vector<double> projections = expected["projections"];
  for (size_t p = 0; p < projections.size(); ++p) {
    double projection = 0;
    for (size_t i = 0; i < gradient.size(); i += 4) {
      const auto words =
          Philox({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                 {static_cast<uint32_t>(i / 4), static_cast<uint32_t>(hash), kSignTag, static_cast<uint32_t>(p)});
      for (size_t k = 0; k < 4 && i + k < gradient.size(); ++k) {
        projection += (words[k] & 1) != 0 ? -gradient[i + k] : gradient[i + k];
      }
    }
    sum += (projection - projections[p]) * (projection - projections[p]);
  }
  return std::sqrt(sum / static_cast<double>(projections.size())) / expected["norm"].get<double>();
}

class Parity : public ::testing::TestWithParam<std::string> {
 protected:
  void Compare(const Json& data, const Technique& technique, const std::string& target);
};

TEST_P(Parity, LossesNormsAndFirstGradientsAreThoseOfPyTorch) {
  std::string target = "cpu";
  if (OnCuda()) {
    const absl::StatusOr<CudaDeviceInfo> info = DescribeCudaDevice(0);
    if (!info.ok()) GTEST_SKIP() << info.status().message();
    ASSERT_OK_AND_ASSIGN(const Target own, TargetOfDevice(info->sm));
    target = own.ToString();
  }
  ASSERT_OK_AND_ASSIGN(const std::string text, ReadFile(GetParam()));
  for (const Technique& technique : Techniques()) {
    SCOPED_TRACE(technique.passes);
    Compare(Json::parse(text), technique, target);
  }
}

void Parity::Compare(const Json& data, const Technique& technique, const std::string& target) {
  const uint64_t seed = data["seed"];
  const int64_t batch = data["batch"], sequence = data["sequence"], steps = data["steps"];
  ASSERT_OK_AND_ASSIGN(
      std::unique_ptr<Module> module,
      LoadModel(data["spec"].get<std::string>(), {.batch = batch, .sequence = sequence, .sets = data["sets"]}));
  const int64_t vocab = module->fact("vocab_size");
  // A cut that PyTorch read from the same spec.
  EXPECT_EQ(module->num_parameters(), data["parameters"].get<int64_t>());
  CompileOptions options;
  options.target = target;
  options.passes = technique.passes;
  options.device_code = OnCuda();
  ASSERT_OK_AND_ASSIGN(proto::PlanProto plan, Compile(std::move(module), options));
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Backend> opened, OnCuda() ? MakeCudaBackend(0) : MakeCpuBackend(0));
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Executor> executor, Executor::Load(std::move(plan), std::move(opened)));
  Backend& backend = executor->backend();
  const auto values_of = [&](const BoundTensor& tensor) {
    std::vector<float> values(static_cast<size_t>(tensor.type.num_elements()));
    backend.CopyToHost(values.data(), tensor.data, static_cast<int64_t>(values.size() * sizeof(float)));
    return values;
  };
  executor->InitializeStates(seed);
  const Program* program = executor->FindProgram("train");
  ASSERT_NE(program, nullptr);
  ASSERT_OK_AND_ASSIGN(StepInputs inputs, StepInputs::Bind(*executor, *program, vocab));

  std::vector<int32_t> tokens(static_cast<size_t>(batch * sequence)), labels(tokens.size());
  double worst_loss = 0, worst_norm = 0, worst_gradient = 0;
  for (int64_t step = 0; step < steps; ++step) {
    MakeBatch(seed, static_cast<uint32_t>(step % data["batches"].get<int64_t>()), batch, sequence, vocab, tokens,
              labels);
    inputs.SetBatch(tokens, labels);
    const double ramp = std::min(1.0, static_cast<double>(step + 1) / data["warmup"].get<double>());
    inputs.SetScalars({.seed = seed,
                       .step = step,
                       .first_sample = step * batch,
                       .lr = data["peak_lr"].get<double>() * ramp,
                       .beta1 = data["beta1"],
                       .beta2 = data["beta2"],
                       .eps = data["eps"],
                       .weight_decay = data["weight_decay"],
                       .grad_clip = data["grad_clip"]});
    program->Run();
    const double loss = values_of(*program->FindOutput("loss"))[0];
    const double norm = values_of(*program->FindOutput("grad_norm"))[0];
    const double want_loss = data["losses"][static_cast<size_t>(step)];
    const double want_norm = data["grad_norms"][static_cast<size_t>(step)];
    worst_loss = std::max(worst_loss, std::abs(loss - want_loss) / want_loss);
    worst_norm = std::max(worst_norm, std::abs(norm - want_norm) / want_norm);
    if (step > 0) continue;
    // After the first step the first moment is (1 - beta1) * clip * gradient.
    const double clip =
        data["grad_clip"].get<double>() > 0 ? std::min(1.0, data["grad_clip"].get<double>() / (norm + 1e-6)) : 1.0;
    const double factor = 1.0 / ((1.0 - data["beta1"].get<double>()) * clip);
    for (const auto& [name, expected] : data["gradients"].items()) {
      const BoundTensor* moment = executor->FindState("adamw.m." + name);
      ASSERT_NE(moment, nullptr) << name;
      const std::vector<float> moments = values_of(*moment);
      std::vector<double> gradient(moments.begin(), moments.end());
      for (double& g : gradient) g *= factor;
      // Keys shift all scores of a query alike: the exact gradient of their bias is zero, what is left is rounding.
      if (expected["norm"].get<double>() < 1e-7) continue;
      const double error = GradientError(seed, name, gradient, expected);
      EXPECT_LE(error, technique.gradient) << name;
      worst_gradient = std::max(worst_gradient, error);
    }
  }
  EXPECT_LE(worst_loss, technique.loss);
  EXPECT_LE(worst_norm, technique.norm);
  const nlohmann::ordered_json line = {{"check", "parity"},
                                       {"model", data["case"]},
                                       {"seed", seed},
                                       {"peer", "torch " + data["torch"].get<std::string>()},
                                       {"target", target},
                                       {"passes", technique.passes},
                                       {"steps", steps},
                                       {"worst_loss", worst_loss},
                                       {"worst_norm", worst_norm},
                                       {"worst_gradient", worst_gradient}};
  std::cout << line.dump() << "\n";
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Parity);
INSTANTIATE_TEST_SUITE_P(Files, Parity, ::testing::ValuesIn(Files()),
                         [](const ::testing::TestParamInfo<std::string>& info) {
                           std::string name = std::filesystem::path(info.param).stem().string();
                           for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
                           return name;
                         });

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::string(argv[i]) == "--data") mt::Files().push_back(argv[i + 1]);
    if (std::string(argv[i]) != "--target") continue;
    if (std::string(argv[i + 1]) != "cuda") {
      std::cerr << "error: --target " << argv[i + 1] << ": expected cuda, the GPU that is here\n";
      return 2;
    }
    mt::OnCuda() = true;
  }
  if (mt::Files().empty()) {
    for (const auto& entry : std::filesystem::directory_iterator(MT_SOURCE_DIR "/tests/parity")) {
      if (entry.path().extension() == ".json") mt::Files().push_back(entry.path().string());
    }
    std::sort(mt::Files().begin(), mt::Files().end());
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
