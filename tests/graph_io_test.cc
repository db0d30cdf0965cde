#include "ir/graph_io.h"

#include <cmath>
#include <functional>
#include <limits>
#include <random>

#include "google/protobuf/text_format.h"
#include "ir/text.h"
#include "tests/random_graph.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr char kModule[] = R"(module @m {
  fact batch = 2
  state "table": f32[64,8] parameter init=normal(0.5) logical=[50,8]
  state "w": f32[8] parameter init=ones
}
graph @train stage=optimized {
  input %x: f32[4,8] data
  input %w: f32[8] parameter
  input %lr: f32[] step
  %0: f32[4,8], %1: f32[4] = rms_norm(%x, %w) {eps=0.5} "norm"
  %2: f32[4,8] = gelu(%0) "act"
  %3: f32[4,8] = gelu(%0) backward recompute_of=%2
  %4: f32[8] = reduce_sum(%3) {dims=[0]} backward
  %5: f32[8] = mul(%4, %lr) optimizer
  output "rstd" %1
  output "w" %5 donates %w
  output "act" %2
}
graph @eval stage=forward {
  input %table: f32[64,8] parameter
  %0: bf16[64,8] = cast(%table) {to=bf16}
  output "low" %0
}
)";

TEST(GraphIoTest, ModuleReadsBackAsWritten) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Module> module, ParseModule(kModule));
  const proto::ModuleProto proto = ToProto(*module);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Module> back, ModuleFromProto(proto));
  EXPECT_EQ(Print(*back), kModule);
  EXPECT_EQ(ToProto(*back).SerializeAsString().size(), proto.SerializeAsString().size());
}

TEST(GraphIoTest, RandomModulesReadBackWhateverTheOrderOfTheNodes) {
  std::mt19937_64 random(3);
  for (uint64_t seed = 0; seed < 100; ++seed) {
    const std::unique_ptr<Module> module = RandomModule(seed, {.nodes = 4 + static_cast<int64_t>(seed % 30)});
    proto::ModuleProto proto = ToProto(*module);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Module> back, ModuleFromProto(proto));
    EXPECT_EQ(Print(*back), Print(*module));
    auto& nodes = *proto.mutable_graphs(0)->mutable_nodes();
    for (int i = nodes.size() - 1; i > 0; --i) nodes.SwapElements(i, static_cast<int>(random() % (i + 1)));
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Module> shuffled, ModuleFromProto(proto));
    EXPECT_EQ(shuffled->FindGraph("train")->num_nodes(), module->FindGraph("train")->num_nodes());
    const auto inputs = RandomInputs<float>(*module->FindGraph("train"), seed);
    ASSERT_OK_AND_ASSIGN(const auto expected, EvaluateGraph<float>(*module->FindGraph("train"), inputs));
    ASSERT_OK_AND_ASSIGN(const auto outputs, EvaluateGraph<float>(*shuffled->FindGraph("train"), inputs));
    EXPECT_EQ(outputs.at("loss").values, expected.at("loss").values);
  }
}

// As a person writes it: ids of their own, nothing but what is needed.
TEST(GraphIoTest, HandWritten) {
  proto::ModuleProto proto;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(R"(
    name: "m"
    states { name: "w" type { dtype: "f32" dims: 3 } }
    graphs {
      name: "train"
      inputs { name: "x" type { dtype: "f32" dims: [2, 3] } role: "data" }
      inputs { name: "w" type { dtype: "f32" dims: 3 } role: "parameter" }
      nodes { id: "double" op: "scale" operands: "norm:0" attrs { name: "factor" int_value: 2 } }
      nodes { id: "norm" op: "rms_norm" operands: ["x", "w"] name: "h0.norm" }
      outputs { name: "y" value: "double" }
    })",
                                                            &proto));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Module> module, ModuleFromProto(proto));
  EXPECT_EQ(Print(*module), R"(module @m {
  state "w": f32[3] parameter init=zeros
}
graph @train stage=forward {
  input %x: f32[2,3] data
  input %w: f32[3] parameter
  %0: f32[2,3], %1: f32[2] = rms_norm(%x, %w) "h0.norm"
  %2: f32[2,3] = scale(%0) {factor=2.0} "double"
  output "y" %2
}
)");
}

TEST(GraphIoTest, AttributesOfEveryKindReadBack) {
  Attrs attrs;
  attrs.Set("bool", false);
  attrs.Set("int", int64_t{0});
  attrs.Set("double", std::numeric_limits<double>::denorm_min());
  attrs.Set("string", std::string("\"a\"\n"));
  attrs.Set("dtype", DType::kU8);
  attrs.Set("empty", IntList{});
  attrs.Set("ints", IntList{-1, int64_t{1} << 60});
  google::protobuf::RepeatedPtrField<proto::AttrProto> protos;
  for (const auto& [name, value] : attrs.entries()) *protos.Add() = ToProto(name, value);
  ASSERT_OK_AND_ASSIGN(const Attrs back, AttrsFromProto(protos));
  EXPECT_EQ(back, attrs);
}

struct Damage {
  const char* name;
  std::function<void(proto::ModuleProto&)> apply;
  const char* error;
};

class GraphIoErrorTest : public ::testing::TestWithParam<Damage> {};

TEST_P(GraphIoErrorTest, IsRefused) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Module> module, ParseModule(kModule));
  proto::ModuleProto proto = ToProto(*module);
  GetParam().apply(proto);
  EXPECT_THAT(ModuleFromProto(proto), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(GetParam().error)));
}

proto::NodeProto& Node0(proto::ModuleProto& m) { return *m.mutable_graphs(0)->mutable_nodes(0); }
proto::NodeProto& Node1(proto::ModuleProto& m) { return *m.mutable_graphs(0)->mutable_nodes(1); }
proto::OutputProto& Output1(proto::ModuleProto& m) { return *m.mutable_graphs(0)->mutable_outputs(1); }

INSTANTIATE_TEST_SUITE_P(
    Damages, GraphIoErrorTest,
    ::testing::Values(
        Damage{"stage", [](auto& m) { m.mutable_graphs(0)->set_stage("x"); }, "\"x\" is no stage"},
        Damage{"role", [](auto& m) { m.mutable_graphs(0)->mutable_inputs(0)->set_role(""); }, "\"\" is no role"},
        Damage{"input", [](auto& m) { m.mutable_graphs(0)->mutable_inputs(0)->set_name("w"); }, "exists already"},
        Damage{"dtype", [](auto& m) { m.mutable_graphs(0)->mutable_inputs(0)->mutable_type()->set_dtype("f3"); },
               "input \"x\": \"f3\" is no dtype"},
        Damage{"dims", [](auto& m) { m.mutable_graphs(0)->mutable_inputs(0)->mutable_type()->add_dims(0); },
               "every dimension must be at least 1"},
        Damage{"rank",
               [](auto& m) {
                 for (int i = 0; i < 9; ++i) m.mutable_graphs(0)->mutable_inputs(0)->mutable_type()->add_dims(1);
               },
               "at most 8 are allowed"},
        Damage{"elements",
               [](auto& m) {
                 m.mutable_states(0)->mutable_type()->set_dims(0, std::numeric_limits<int64_t>::max());
               },
               "the limit for one tensor"},
        Damage{"no_id", [](auto& m) { Node0(m).set_id(""); }, "node 0 has no id"},
        Damage{"colon", [](auto& m) { Node0(m).set_id("a:0"); }, "an id holds no colon"},
        Damage{"same_id", [](auto& m) { Node0(m).set_id("1"); }, "have the id \"1\"; ids are unique"},
        Damage{"input_id", [](auto& m) { Node0(m).set_id("x"); }, "have the id \"x\"; ids are unique"},
        Damage{"op", [](auto& m) { Node0(m).set_op("rmsnorm"); }, "unknown op \"rmsnorm\"; did you mean rms_norm?"},
        Damage{"operand", [](auto& m) { Node0(m).set_operands(0, "z"); }, "operand \"z\" is no input or node"},
        Damage{"which", [](auto& m) { Node1(m).set_operands(0, "0"); }, "\"0\" has 2 results; say which one"},
        Damage{"index", [](auto& m) { Node1(m).set_operands(0, "0:2"); }, "\"0:2\" is result 2 of 2"},
        Damage{"negative", [](auto& m) { Node1(m).set_operands(0, "0:-1"); }, "expected ID or ID:INDEX"},
        Damage{"cycle", [](auto& m) { Node0(m).set_operands(0, "1"); }, "node \"0\" is on or after a cycle"},
        Damage{"few", [](auto& m) { Node0(m).mutable_operands()->RemoveLast(); }, "node \"0\": rms_norm \"norm\""},
        Damage{"attr", [](auto& m) { Node0(m).mutable_attrs(0)->set_name("epsilon"); }, "unknown attribute epsilon"},
        Damage{"attr_kind", [](auto& m) { Node0(m).mutable_attrs(0)->set_bool_value(true); }, "eps=true is a bool"},
        Damage{"attr_none", [](auto& m) { Node0(m).mutable_attrs(0)->clear_value(); }, "\"eps\" has no value"},
        Damage{"attr_twice", [](auto& m) { *Node0(m).add_attrs() = Node0(m).attrs(0); }, "\"eps\" is given twice"},
        Damage{"attr_name", [](auto& m) { Node0(m).mutable_attrs(0)->clear_name(); }, "an attribute has no name"},
        Damage{"attr_dtype", [](auto& m) { Node0(m).mutable_attrs(0)->set_dtype_value("f1"); }, "\"f1\" is no dtype"},
        Damage{"attr_nan", [](auto& m) { Node0(m).mutable_attrs(0)->set_double_value(NAN); }, "is not a number"},
        Damage{"types", [](auto& m) { Node0(m).mutable_types()->RemoveLast(); }, "1 types are given; rms_norm has 2"},
        Damage{"type", [](auto& m) { Node0(m).mutable_types(0)->set_dims(0, 5); },
               "result 0 is written as f32[5,8], but rms_norm gives f32[4,8]"},
        Damage{"phase", [](auto& m) { Node0(m).set_phase("late"); }, "\"late\" is no phase"},
        Damage{"recompute", [](auto& m) { Node0(m).set_recompute_of("z"); }, "recompute_of \"z\" is no node"},
        Damage{"recompute_other", [](auto& m) { Node0(m).set_recompute_of("1"); }, "of the same op"},
        Damage{"output", [](auto& m) { Output1(m).set_value("9"); }, "output \"w\": \"9\" is no input or node"},
        Damage{"donates", [](auto& m) { Output1(m).set_donates("q"); }, "donates \"q\", which is no input"},
        Damage{"donation", [](auto& m) { Output1(m).set_donates("x"); }, "whose role is data; expected a state"},
        Damage{"no_update", [](auto& m) { Output1(m).clear_donates(); }, "is a parameter that no output donates"},
        Damage{"graph", [](auto& m) { m.mutable_graphs(1)->set_name("train"); }, "two graphs are named \"train\""},
        Damage{"graph_name", [](auto& m) { m.mutable_graphs(1)->set_name("a b"); }, "cannot name a graph"},
        Damage{"module_name", [](auto& m) { m.clear_name(); }, "cannot name a module"},
        Damage{"fact", [](auto& m) { (*m.mutable_facts())["a b"] = 1; }, "cannot name a fact"},
        Damage{"state", [](auto& m) { m.mutable_states(1)->set_name("table"); }, "exists already"},
        Damage{"state_role", [](auto& m) { m.mutable_states(1)->set_role("x"); }, "state \"w\": \"x\" is no role"},
        Damage{"state_data", [](auto& m) { m.mutable_states(1)->set_role("data"); }, "has role data"},
        Damage{"state_init", [](auto& m) { m.mutable_states(1)->set_init("x"); }, "is not an initial value"},
        Damage{"state_gone", [](auto& m) { m.mutable_states()->RemoveLast(); }, "not among the module's states"},
        Damage{"logical", [](auto& m) { m.mutable_states(0)->set_logical_dims(0, 65); }, "do not fit in f32[64,8]"},
        Damage{"many_states",
               [](auto& m) {
                 for (int64_t i = 0; i <= kMaxInputs; ++i) m.add_states();
               },
               "at most 16384 are allowed"},
        Damage{"many_nodes",
               [](auto& m) {
                 for (int64_t i = 0; i <= kMaxNodes; ++i) m.mutable_graphs(0)->add_nodes();
               },
               "at most 1000000 are allowed"}),
    [](const auto& info) { return std::string(info.param.name); });

// Bytes that were damaged on the way: refused, or a module that holds together.
TEST(GraphIoTest, DamagedBytesAreAnErrorOrAModule) {
  std::mt19937_64 random(5);
  int64_t refused = 0;
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    std::string bytes = ToProto(*RandomModule(seed % 10, {.nodes = 8})).SerializeAsString();
    bytes[random() % bytes.size()] = static_cast<char>(random() % 128);
    proto::ModuleProto proto;
    if (!proto.ParseFromString(bytes)) continue;
    const absl::StatusOr<std::unique_ptr<Module>> module = ModuleFromProto(proto);
    if (module.ok()) {
      EXPECT_OK(ParseModule(Print(**module)));
    } else {
      EXPECT_EQ(module.status().code(), absl::StatusCode::kInvalidArgument) << module.status();
      ++refused;
    }
  }
  EXPECT_GT(refused, 200);
}

}  // namespace
}  // namespace mt
