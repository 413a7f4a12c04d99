// Rounding of floats to whole floats, for |x| < 2^22. Include inside the namespace of a level, after Vec.

template <class V>
struct Rounding {
  using F = typename V::F;

  static F round(F x) {  // to nearest even
    const F magic = V::set(12582912.0f);
    return V::sub(V::add(x, magic), magic);
  }
  static F floor(F x) {
    const F r = round(x);
    return V::sub(r, V::positive(V::sub(r, x)));
  }
  static F ceil(F x) { return V::sub(V::set(0.0f), floor(V::sub(V::set(0.0f), x))); }
  static F clamp(F x, float low, float high) { return V::min(V::max(x, V::set(low)), V::set(high)); }
};
