// Checkpoints: what is written comes back; failed and cut-off saves leave the last good one; damage is found.
#include "runtime/checkpoint/checkpoint.h"

#include <unistd.h>

#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "ir/base/file.h"
#include "runtime/checkpoint/saver.h"
#include "runtime/checkpoint/states.h"
#include "runtime/data/crc32c.h"
#include "tests/file_faults.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

// Bytes that depend on the step, so that a mix of two is seen.
Checkpoint Made(int64_t step, size_t elements = 12) {
  Checkpoint made;
  made.step = step;
  made.model = "tiny";
  made.progress = {{"steps", step}, {"loss", 1.0 / static_cast<double>(step + 1)}};
  made.identity = {{"lr", 0.001}};
  made.environment = {{"blas", "x"}};
  for (const char* name : {"a.weight", "b.bias", "adamw.m.a.weight", "adamw.t"}) {
    SavedState state;
    state.tensor.name = name;
    state.tensor.shape = {static_cast<int64_t>(elements)};
    state.parameter = name[0] != 'a' || name[1] == '.';
    for (size_t i = 0; i < elements * 4; ++i) {
      state.bytes.push_back(static_cast<char>(static_cast<size_t>(step) * 31 + i * 7 + made.states.size()));
    }
    made.states.push_back(std::move(state));
  }
  return made;
}

// Of which step all bytes are; -1 where they are of none.
int64_t StepOfContents(const CheckpointReader& reader, size_t elements = 12) {
  const Checkpoint expected = Made(reader.step(), elements);
  if (reader.progress() != nlohmann::json(expected.progress)) return -1;
  for (const SavedState& state : expected.states) {
    const SafetensorsReader& file = state.parameter ? reader.weights() : reader.optimizer();
    const SafetensorsTensor* tensor = file.Find(state.tensor.name);
    if (tensor == nullptr || file.Bytes(*tensor) != state.bytes) return -1;
  }
  return reader.step();
}

class CheckpointTest : public ::testing::Test {
 protected:
  CheckpointTest() : root_(absl::StrCat(::testing::TempDir(), "/checkpoint_test-", getpid())) {
    fs::remove_all(root_);
    fs::create_directories(root_);
  }
  ~CheckpointTest() override { fs::remove_all(root_); }

  std::string Folder(const std::string& name) const {
    const std::string folder = absl::StrCat(root_, "/", name);
    fs::remove_all(folder);
    fs::create_directories(folder);
    return folder;
  }
  static std::vector<std::string> Names(const std::string& folder) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
  }

  const std::string root_;
};

TEST_F(CheckpointTest, ComesBackAndKeepsTheNewest) {
  const std::string folder = Folder("runs");
  ASSERT_OK_AND_ASSIGN(const NewestCheckpoint none, FindNewestCheckpoint(folder));
  EXPECT_EQ(none.checkpoint, nullptr);
  for (const int64_t step : {8, 9, 10, 100}) ASSERT_OK(WriteCheckpoint(folder, Made(step), 2));
  EXPECT_THAT(Names(folder), ElementsAre("step-10", "step-100"));
  EXPECT_THAT(Names(folder + "/step-10"), ElementsAre("manifest.json", "model.safetensors", "optimizer.safetensors"));
  ASSERT_OK_AND_ASSIGN(const NewestCheckpoint newest, FindNewestCheckpoint(folder));
  ASSERT_NE(newest.checkpoint, nullptr);
  EXPECT_THAT(newest.damaged, IsEmpty());
  EXPECT_EQ(StepOfContents(*newest.checkpoint), 100);
  EXPECT_EQ(newest.checkpoint->identity()["lr"], 0.001);
  EXPECT_EQ(newest.checkpoint->environment()["blas"], "x");
  // A run that went back to an earlier step leaves nothing of what was after it.
  ASSERT_OK(WriteCheckpoint(folder, Made(11), 2));
  EXPECT_THAT(Names(folder), ElementsAre("step-10", "step-11"));
  ASSERT_OK(RemoveCheckpoints(folder));
  EXPECT_THAT(Names(folder), IsEmpty());
}

TEST_F(CheckpointTest, ADamagedOneIsNamedAndTheOneBeforeTaken) {
  const std::string folder = Folder("damaged");
  for (const int64_t step : {1, 2, 3}) ASSERT_OK(WriteCheckpoint(folder, Made(step), 3));
  const std::string weights = folder + "/step-3/model.safetensors";
  std::string bytes = ReadFile(weights).value();
  bytes[bytes.size() - 3] ^= 1;
  ASSERT_OK(WriteFile(weights, bytes));
  fs::remove(folder + "/step-2/manifest.json");
  ASSERT_OK_AND_ASSIGN(const NewestCheckpoint newest, FindNewestCheckpoint(folder));
  EXPECT_EQ(StepOfContents(*newest.checkpoint), 1);
  EXPECT_THAT(newest.damaged, ElementsAre(AllOf(HasSubstr("step-3/model.safetensors"), HasSubstr("checksum")),
                                          HasSubstr("step-2/manifest.json")));
  // It is replaced when the run comes to that step again.
  ASSERT_OK(WriteCheckpoint(folder, Made(2), 3));
  EXPECT_THAT(Names(folder), ElementsAre("step-1", "step-2"));
  EXPECT_EQ(StepOfContents(**CheckpointReader::Open(folder + "/step-2")), 2);
  ASSERT_OK(WriteFile(folder + "/step-1/optimizer.safetensors", "short"));
  ASSERT_OK(WriteFile(folder + "/step-2/optimizer.safetensors", "short"));
  EXPECT_THAT(FindNewestCheckpoint(folder),
              StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr("step-1/"), HasSubstr("step-2/"))));
  // A folder under another name is not what its manifest says.
  ASSERT_OK(WriteCheckpoint(folder, Made(5), 3));
  fs::rename(folder + "/step-5", folder + "/step-7");
  EXPECT_THAT(CheckpointReader::Open(folder + "/step-7"),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("says step 5")));
}

TEST_F(CheckpointTest, NoSpaceIsSeenBeforeAnythingIsWritten) {
  class Small : public FileSystem {
    int64_t FreeBytes(const std::string&) override { return 1000; }
  } small;
  const std::string folder = Folder("small");
  EXPECT_THAT(WriteCheckpoint(folder, Made(1), 2, small),
              StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr("1000 B free"), HasSubstr("--keep"))));
  EXPECT_THAT(Names(folder), IsEmpty());
}

// Every call of a save fails once in each way: the last good checkpoint is there, or the new one is.
TEST_F(CheckpointTest, FaultsAtEveryCall) {
  QuickFiles quick;
  int64_t saves = 0, failures = 0;
  for (const Fault fault : {Fault::kNoSpace, Fault::kIo, Fault::kShort, Fault::kFull, Fault::kDead}) {
    for (int64_t at = 0;; ++at) {
      const std::string folder = Folder("faults");
      ASSERT_OK(WriteCheckpoint(folder, Made(1), 1, quick));
      FaultyFiles files(fault, at);
      const absl::Status status = WriteCheckpoint(folder, Made(2), 1, files);
      SCOPED_TRACE(absl::StrCat("fault ", static_cast<int>(fault), " at call ", at, ": ", status.ToString()));
      ++saves;
      failures += status.ok() ? 0 : 1;
      if (!status.ok()) {
        EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
      }
      if (fault == Fault::kShort) {
        EXPECT_OK(status);
      }
      ASSERT_OK_AND_ASSIGN(const NewestCheckpoint newest, FindNewestCheckpoint(folder));
      ASSERT_NE(newest.checkpoint, nullptr);
      EXPECT_THAT(newest.damaged, IsEmpty());
      const int64_t step = StepOfContents(*newest.checkpoint);
      EXPECT_TRUE(step == 2 || (step == 1 && !status.ok())) << step;
      // The next save puts everything right.
      RemoveLeftovers(folder, {});
      for (const std::string& name : Names(folder)) EXPECT_THAT(name, ::testing::AnyOf("step-1", "step-2"));
      ASSERT_OK(WriteCheckpoint(folder, Made(3), 1, quick));
      EXPECT_THAT(Names(folder), ElementsAre("step-3"));
      if (at >= files.calls()) break;
    }
  }
  std::printf("%lld saves with a fault, %lld failed\n", static_cast<long long>(saves),
              static_cast<long long>(failures));
  EXPECT_GT(failures, 100);
}

// The power goes after every call of a save, and what was not synced is lost in several ways.
TEST_F(CheckpointTest, PowerCutsAfterEveryCall) {
  const std::string folder = Folder("recorded");
  ASSERT_OK(WriteCheckpoint(folder, Made(1), 1));
  const std::map<std::string, std::string> before = ReadTree(folder);
  RecordingFiles files(folder);
  ASSERT_OK(WriteCheckpoint(folder, Made(2), 1, files));
  int64_t cuts = 0, of_new = 0;
  for (size_t count = 0; count <= files.changes().size(); ++count) {
    for (const Loss loss : {Loss::kNothing, Loss::kBytes, Loss::kHalfOfBytes, Loss::kZeros, Loss::kNames,
                            Loss::kEverything, Loss::kSomeOfAll}) {
      for (uint64_t seed = 0; seed < (loss == Loss::kSomeOfAll ? 8 : 1); ++seed) {
        SCOPED_TRACE(absl::StrCat(count, " changes, loss ", static_cast<int>(loss), ", seed ", seed));
        const std::string after = Folder("after");
        BuildAfterPowerCut(before, files.changes(), count, loss, seed, after);
        ASSERT_OK_AND_ASSIGN(const NewestCheckpoint newest, FindNewestCheckpoint(after));
        ASSERT_NE(newest.checkpoint, nullptr);
        EXPECT_THAT(newest.damaged, IsEmpty());
        const int64_t step = StepOfContents(*newest.checkpoint);
        EXPECT_TRUE(step == 1 || step == 2) << step;
        if (count == files.changes().size()) {
          EXPECT_EQ(step, 2) << "the save had said that it is done";
        }
        of_new += step == 2 ? 1 : 0;
        RemoveLeftovers(after, {});
        for (const std::string& name : Names(after)) EXPECT_THAT(name, ::testing::AnyOf("step-1", "step-2"));
        ++cuts;
      }
    }
  }
  std::printf("%lld power cuts over %d changes, %lld of them found the new checkpoint\n", static_cast<long long>(cuts),
              static_cast<int>(files.changes().size()), static_cast<long long>(of_new));
  EXPECT_GT(of_new, 0);
  EXPECT_LT(of_new, cuts);
}

// Without the syncs a power cut must be seen to mix old and new: else the test above proves nothing.
TEST_F(CheckpointTest, PowerCutsAreSeen) {
  class NoSync : public RecordingFiles {
   public:
    using RecordingFiles::RecordingFiles;
    int Sync(int) override { return 0; }
  };
  const std::string folder = Folder("recorded");
  ASSERT_OK(WriteCheckpoint(folder, Made(1), 1));
  const std::map<std::string, std::string> before = ReadTree(folder);
  NoSync files(folder);
  ASSERT_OK(WriteCheckpoint(folder, Made(2), 1, files));
  const std::string after = Folder("after");
  BuildAfterPowerCut(before, files.changes(), files.changes().size(), Loss::kBytes, 0, after);
  EXPECT_THAT(FindNewestCheckpoint(after), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("step-2/")));
}

void WriteQuickly(const std::string& path, const std::string& bytes) {
  const int descriptor = SystemFiles().CreateFile(path);
  CHECK_EQ(SystemFiles().WriteAt(descriptor, bytes, 0), static_cast<int64_t>(bytes.size()));
  SystemFiles().Close(descriptor);
}

// Puts the right checksums over what was changed, so that the parsers are what is tested.
void RepairChecksums(const std::string& path) {
  std::string manifest = ReadFile(path + "/manifest.json").value();
  for (const char* name : {"model.safetensors", "optimizer.safetensors"}) {
    const size_t at = manifest.find(absl::StrCat("\"name\": \"", name, "\""));
    if (at == std::string::npos) return;
    const size_t crc = manifest.find("\"crc32c\": \"", at);
    if (crc == std::string::npos || crc + 19 > manifest.size()) return;
    manifest.replace(crc + 11, 8, absl::StrFormat("%08x", Crc32c(ReadFile(absl::StrCat(path, "/", name)).value())));
  }
  const size_t at = manifest.rfind(",\n  \"crc32c\": \"");
  if (at == std::string::npos) return;
  const std::string text = absl::StrCat(manifest.substr(0, at), "\n}");
  WriteQuickly(path + "/manifest.json", absl::StrCat(manifest.substr(0, at), ",\n  \"crc32c\": \"",
                                                     absl::StrFormat("%08x", Crc32c(text)), "\"\n}\n"));
}

TEST_F(CheckpointTest, BitFlips) {
  const std::string folder = Folder("flips"), path = folder + "/step-4";
  ASSERT_OK(WriteCheckpoint(folder, Made(4, 3), 1));
  const std::map<std::string, std::string> good = ReadTree(path);
  std::vector<std::string> names;
  for (const auto& [name, bytes] : good) names.push_back(name);
  const auto write = [&](const std::string& name, const std::string& bytes) {
    WriteQuickly(absl::StrCat(path, "/", name), bytes);
  };
  std::mt19937_64 random(7);
  int64_t found = 0;
  for (int64_t flip = 0; flip < 1000; ++flip) {
    const std::string& name = names[random() % names.size()];
    std::string bytes = good.at(name);
    bytes[random() % bytes.size()] ^= static_cast<char>(1 << random() % 8);
    write(name, bytes);
    if (flip % 2 == 1) RepairChecksums(path);
    const auto reader = CheckpointReader::Open(path);
    if (flip % 2 == 0) {
      EXPECT_FALSE(reader.ok()) << name;
    }
    if (reader.ok()) StepOfContents(**reader);
    found += reader.ok() ? 0 : 1;
    for (const auto& [file, contents] : good) write(file, contents);
  }
  std::printf("%lld of 1000 flips refused; 500 had right checksums\n", static_cast<long long>(found));
  EXPECT_GE(found, 500);
  EXPECT_OK(CheckpointReader::Open(path));
}

TEST_F(CheckpointTest, TheSaverWritesWhileOthersGoOn) {
  const std::string folder = Folder("background");
  CheckpointSaver saver(folder, 2);
  for (const int64_t step : {1, 2, 3}) {
    ASSERT_OK(saver.Wait());
    saver.snapshot() = Made(step);
    saver.Start();
  }
  ASSERT_OK(saver.Wait());
  EXPECT_THAT(Names(folder), ElementsAre("step-2", "step-3"));

  FaultyFiles files(Fault::kIo, 5);
  CheckpointSaver failing(folder, 2, files);
  failing.snapshot() = Made(4);
  failing.Start();
  absl::Status told;
  while (told.ok() && !files.failed()) told = failing.Poll();
  if (told.ok()) told = failing.Wait();
  EXPECT_THAT(told, StatusIs(absl::StatusCode::kDataLoss, HasSubstr("Input/output error")));
  EXPECT_OK(failing.Wait()) << "an error is told once";
  EXPECT_THAT(Names(folder), ElementsAre("step-2", "step-3"));
}

// Logical state of a plan, as a snapshot has it.
std::map<std::string, std::string> Snapshot(Executor& executor) {
  std::vector<SavedState> states;
  SnapshotStates(executor, &states);
  std::map<std::string, std::string> bytes;
  for (SavedState& state : states) bytes[state.tensor.name] = std::move(state.bytes);
  return bytes;
}

class StatesTest : public CheckpointTest {
 protected:
  static absl::StatusOr<std::unique_ptr<LoadedPlan>> Trained(const std::string& passes, int64_t steps) {
    ASSIGN_OR_RETURN(std::unique_ptr<Module> module,
                     LoadModel("tiny_char", {.batch = 2,
                                             .sequence = 16,
                                             .vocab_size = 100,  // Padded to 128; 8 bits begin at 4,096 elements.
                                             .sets = {"layers=1", "width=64", "heads=2", "ffn_width=96"}}));
    ASSIGN_OR_RETURN(proto::PlanProto plan, Compile(std::move(module), {.passes = passes}));
    ASSIGN_OR_RETURN(std::unique_ptr<LoadedPlan> loaded, LoadForTest(std::move(plan), 1));
    for (int64_t step = 0; step < steps; ++step) {
      RETURN_IF_ERROR(loaded->Prepare(step));
      loaded->train->Run();
    }
    return loaded;
  }
  std::unique_ptr<CheckpointReader> Save(LoadedPlan& from) {
    const std::string folder = Folder("states");
    Checkpoint checkpoint = Made(1);
    SnapshotStates(*from.executor, &checkpoint.states);
    CHECK(WriteCheckpoint(folder, checkpoint, 1).ok());
    return *CheckpointReader::Open(folder + "/step-1");
  }
};

TEST_F(StatesTest, TheSamePlanGetsEveryByteBack) {
  for (const char* passes : {"none", "bf16,flash,chunked_loss,pad_vocab,remat", "fp16", "adamw8bit,pad_vocab"}) {
    SCOPED_TRACE(passes);
    ASSERT_OK_AND_ASSIGN(const auto trained, Trained(passes, 3));
    ASSERT_OK_AND_ASSIGN(const auto other, Trained(passes, 0));
    const std::map<std::string, std::string> expected = Snapshot(*trained->executor);
    ASSERT_NE(Snapshot(*other->executor), expected);
    const std::unique_ptr<CheckpointReader> saved = Save(*trained);
    ASSERT_OK_AND_ASSIGN(const std::vector<std::string> fresh, RestoreStates(*other->executor, *saved));
    EXPECT_THAT(fresh, IsEmpty());
    EXPECT_EQ(Snapshot(*other->executor), expected);
    // And goes on as the other does.
    for (LoadedPlan* plan : {trained.get(), other.get()}) {
      ASSERT_OK(plan->Prepare(3));
      plan->train->Run();
    }
    EXPECT_EQ(Snapshot(*other->executor), Snapshot(*trained->executor));
  }
}

TEST_F(StatesTest, PaddingAndPrecisionMayDiffer) {
  struct Case {
    const char *from, *to;
    std::vector<std::string> fresh;  // Groups.
  };
  const Case cases[] = {{"none", "pad_vocab", {}},
                        {"pad_vocab", "none", {}},
                        {"adamw8bit", "adamw8bit,pad_vocab", {}},
                        {"adamw8bit,pad_vocab", "adamw8bit", {}},
                        {"none", "bf16,flash,remat", {}},
                        {"fp16", "bf16", {}},
                        {"bf16", "fp16", {"loss_scale"}},
                        {"none", "adamw8bit", {"adamw"}},
                        {"adamw8bit", "none", {"adamw"}}};
  for (const Case& each : cases) {
    SCOPED_TRACE(absl::StrCat(each.from, " -> ", each.to));
    ASSERT_OK_AND_ASSIGN(const auto from, Trained(each.from, 3));
    ASSERT_OK_AND_ASSIGN(const auto to, Trained(each.to, 0));
    const std::map<std::string, std::string> initial = Snapshot(*to->executor), saved = Snapshot(*from->executor);
    const std::unique_ptr<CheckpointReader> reader = Save(*from);
    ASSERT_OK_AND_ASSIGN(const std::vector<std::string> fresh, RestoreStates(*to->executor, *reader));
    ASSERT_EQ(fresh.size(), each.fresh.size());
    for (size_t i = 0; i < fresh.size(); ++i) {
      EXPECT_THAT(fresh[i], HasSubstr(absl::StrCat("the state of ", each.fresh[i], " starts fresh")));
    }
    for (const auto& [name, bytes] : Snapshot(*to->executor)) {
      const std::string group = name.substr(0, name.find('.'));
      const bool starts_fresh = std::find(each.fresh.begin(), each.fresh.end(), group) != each.fresh.end();
      const std::string& expected = starts_fresh ? initial.at(name) : saved.at(name);
      const size_t common = std::min(bytes.size(), expected.size());  // Scales of blocks follow the padding.
      EXPECT_EQ(bytes.substr(0, common), expected.substr(0, common)) << name;
    }
  }
}

TEST_F(StatesTest, AnotherModelIsRefused) {
  ASSERT_OK_AND_ASSIGN(const auto trained, Trained("none", 1));
  const std::unique_ptr<CheckpointReader> saved = Save(*trained);
  ASSERT_OK_AND_ASSIGN(const auto wider, LoadForTest(TinyPlan({"width=32"}, 2, 16, 40), 1));
  EXPECT_THAT(RestoreStates(*wider->executor, *saved),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("model.safetensors")));
}

}  // namespace
}  // namespace mt
