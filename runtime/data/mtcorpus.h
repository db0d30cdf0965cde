// The mtcorpus command as a function.
#ifndef MT_RUNTIME_DATA_MTCORPUS_H_
#define MT_RUNTIME_DATA_MTCORPUS_H_

namespace mt {

// Returns the exit code.
int MtcorpusMain(int argc, char** argv);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_MTCORPUS_H_
