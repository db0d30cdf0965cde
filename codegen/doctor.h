// mtc doctor: what this machine and this build can do.
#ifndef MT_CODEGEN_DOCTOR_H_
#define MT_CODEGEN_DOCTOR_H_

#include <string>
#include <vector>

namespace mt {

struct Diagnosis {
  enum class Verdict { kOk, kWarn, kFix };  // Fix: something that is needed does not work.
  Verdict verdict = Verdict::kOk;
  std::string subject, finding;
};

// CPU, cores, memory, libraries, GPU, CUDA, the zoo, mtrun beside mtc, and one tiny model compiled, verified and read
// back.
std::vector<Diagnosis> Examine();

// "ok    cores    2 of 2 usable", a line each.
std::string FormatDiagnoses(const std::vector<Diagnosis>& diagnoses);

}  // namespace mt

#endif  // MT_CODEGEN_DOCTOR_H_
