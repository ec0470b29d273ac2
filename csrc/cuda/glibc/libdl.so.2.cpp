// As libpthread.so.0.cpp.
#define OLD(name) \
  extern "C" void name() {}
OLD(dlclose) OLD(dlerror) OLD(dlmopen) OLD(dlopen) OLD(dlsym) OLD(dlvsym)
