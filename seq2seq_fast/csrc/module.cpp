// The Python module: importing it runs the static registrations of the other files. Its one name
// says which instruction set the CPU kernels run in.
#include <Python.h>

#include "cpu/loops.h"

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef def = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&def);
  if (module != nullptr &&
      PyModule_AddStringConstant(module, "cpu_capability", seq2seq_fast::loops.name) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
