// Byte pair encoding over bytes (GPT-2) or characters (SentencePiece): the engine, and training.
// Sources: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016), algorithm 1; Radford
// et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.2; Kudo and Richardson,
// "SentencePiece" (2018).
#ifndef MT_RUNTIME_DATA_BPE_H_
#define MT_RUNTIME_DATA_BPE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/data/pretokenizer.h"
#include "runtime/data/tokenizer.h"

namespace mt {

// Everything that the ids of a text depend on.
struct BpeModel {
  enum class Unit { kByte, kCharacter };
  enum class Kind : uint8_t {
    kHole,     // No token has the id.
    kText,     // Made by merging.
    kByte,     // Characters: one byte of a character that the vocabulary lacks.
    kUnknown,  // Characters: stands for what the vocabulary lacks.
    kSpecial,  // Never made from a text.
    kLiteral,  // Found in the text before anything else, the longest first; nothing merges across it.
  };
  struct Token {
    std::string text;  // Bytes; in characters a space stands for itself and for U+2581. Specials: the name.
    Kind kind = Kind::kHole;
    bool normalized = false;  // kLiteral: looked for in the normalized text.
  };
  struct Rule {
    int32_t left, right, id;
  };
  enum class Form { kNone, kNfc, kNfkc };        // Of Unicode's normalization.
  enum class Prefix { kNone, kText, kSegment };  // A space before the text, or before each stretch between literals.

  Unit unit = Unit::kByte;
  std::vector<Token> tokens;     // By id.
  std::vector<Rule> rules;       // In the order of their ranks.
  bool rank_by_result = false;   // Neighbouring rules of one result have one rank: the leftmost goes first.
  std::vector<int32_t> tied;     // With rank_by_result: results whose rules have the rank of the rules before them.
  bool ignore_merges = false;    // A word that is a token is that token.
  Form form = Form::kNone;       // Of the text, first.
  bool collapse_spaces = false;  // Runs of spaces become one, those at both ends none.
  Prefix prefix = Prefix::kNone;
  bool prefix_unless_space = false;  // Only where there is no space yet.
  std::vector<SplitStep> split;
  int32_t end_of_document = -1;  // A kSpecial token.
  std::string source;            // The tokenizer.json that it was read from; empty: written anew.
};

// Checks that the model can encode every text, and prepares it. REQUIRES: ids in range.
// Errors: FailedPrecondition (a byte is missing, a pattern is not supported; names it).
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpe(BpeModel model);

// Ids: 256 bytes by value, merges in the order they were learned, the end of a document. Of pairs that occur equally
// often the one with the smaller ids is merged first.
std::unique_ptr<TokenizerTrainer> NewBpeTrainer(int64_t vocab_size);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_BPE_H_
