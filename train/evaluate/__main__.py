"""The scorecard's command: see `train.evaluate.evaluate`."""

from train.evaluate.evaluate import main

if __name__ == "__main__":
    main()
