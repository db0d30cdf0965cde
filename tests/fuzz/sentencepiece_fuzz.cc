// A SentencePiece .model.
#include <string>

#include "proto/sentencepiece.pb.h"
#include "runtime/data/tokenizer_files.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/tokenizer_checks.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  mt::ExpectWhole(mt::ParseSentencePiece(mt::Bytes(data, size)));
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  mt::proto::sentencepiece::ModelProto model;
  return mt::MutateBinary(data, size, max_size, seed, model);
}
