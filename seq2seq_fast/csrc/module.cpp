// The Python module: importing it runs the static registrations of the other files. Its names say
// which instruction set the CPU kernels run in, and which GPUs the CUDA kernels were compiled for:
// compute capabilities such as "80 90", "" where they are left out. Later GPUs run them as well,
// earlier ones do not.
#include <Python.h>

#include "cpu/loops.h"

#ifndef S2S_CUDA_ARCHITECTURES
#define S2S_CUDA_ARCHITECTURES ""
#endif

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef def = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&def);
  if (module != nullptr &&
      (PyModule_AddStringConstant(module, "cpu_capability", seq2seq_fast::loops.name) != 0 ||
       PyModule_AddStringConstant(module, "cuda_architectures", S2S_CUDA_ARCHITECTURES) != 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
