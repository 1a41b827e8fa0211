"""Operations with several implementations, one folder each. Of ours they import nothing."""
