"""`python -m vjepa_fast.data.physics` and `make_physics`: documented here, at home in data/generated/."""

from vjepa_fast.data.generated.physics import main, make_physics

__all__ = ["make_physics"]

if __name__ == "__main__":
    main()
