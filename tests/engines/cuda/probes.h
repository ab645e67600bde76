// Kernels of the tests alone: one piece of the product by itself, and kernels with a mistake that the emulator has to find.
struct ProbeArgs {
  Global<const uint8_t> x;
  Global<uint8_t> y;
  uint32_t code, least, most;
  int32_t a_signed, mistake, reserved;
};

// Four bytes a thread.
KERNEL(probe_extract, ProbeArgs, 64, 2) {
  for (int64_t i = thread_index(); i * 4 < static_cast<int64_t>(args.x.bytes); i += 64) {
    uint32_t v = 0;
    for (int e = 0; e < 4; e++) v |= static_cast<uint32_t>(args.x.get(i * 4 + e)) << (8 * e);
    const Extraction how = extraction(args.code, args.least, args.most);
    v = args.a_signed ? extract_bytes<true>(v, how) : extract_bytes<false>(v, how);
    for (int e = 0; e < 4; e++) args.y.put(i * 4 + e, static_cast<uint8_t>(v >> (8 * e)));
  }
}

KERNEL(probe_mistake, ProbeArgs, 64, 2) {
  const int thread = thread_index();
  uint32_t fragment[4];
  switch (args.mistake) {
    case 0: break;                                                              // none
    case 1: args.y.put(static_cast<int64_t>(args.y.bytes), 1); break;           // one behind the end
    case 2: args.x.get(-1); break;                                              // one before the start
    case 3: Shared::put(thread / 2, 1); break;                                  // two threads write a byte
    case 4:  // a byte is read in the interval of its write
      Shared::put(thread, 1);
      barrier();
      Shared::put(thread, 2);
      Shared::word(0);
      break;
    case 5: Shared::word(1024); break;                                          // nobody wrote it
    case 6: Shared::put(1 << 20, 1); break;                                     // beyond shared memory
    case 7: args.x.get16(1); break;                                             // not aligned
    case 8: if (thread) barrier(); break;                                       // one thread does not come
    case 9: copy16_later(thread * 16, args.x, 0); break;                        // nobody waits for the copies
    case 10: args.y.put(0, 1); break;                                           // all threads write one element
    case 11: if (thread % 32) from_lane(1.0f, 0); break;                        // a lane is elsewhere
    case 12: Shared::put(thread, 1); barrier(); load_fragment(fragment, 1); break;  // rows of ldmatrix not aligned
    case 13: copy16_later(thread * 16, args.x, 0); Shared::word(thread * 16 / 64 * 64); wait_for_copies(); break;  // read too soon
  }
}
