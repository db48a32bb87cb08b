//! Messages of one turn to one peer, sent as one.
//!
//! Each message on its own costs a stream and an acknowledgement, which is more than the
//! protocol spends on it. Many jobs at once have many messages in each turn, and most of
//! them go to a few peers. A bundle is a big-endian `u32` length before each message.

use p2pit_protocol::wire::MESSAGE_BYTES_MAX;

/// Most messages of one bundle: bounds what a turn takes on with one input.
const MESSAGES_MAX: usize = 128;
const HEAD_BYTES: usize = 4;
/// A bundle of several messages is at most this long: the network has more room for many
/// small things than for a few large ones.
const SEVERAL_BYTES_MAX: usize = 64 << 10;
/// The longest bundle: any message fits into one.
pub(crate) const BUNDLE_BYTES_MAX: usize = MESSAGE_BYTES_MAX + HEAD_BYTES;

/// As few bundles as it takes, with the messages in order. A message that is too long for
/// any is in a bundle of its own, which the network refuses.
pub(super) fn pack(messages: impl IntoIterator<Item = Vec<u8>>) -> Vec<Vec<u8>> {
    let mut bundles: Vec<Vec<u8>> = Vec::new();
    let mut count = 0;
    for message in messages {
        let bytes = HEAD_BYTES + message.len();
        let last = bundles.last_mut().filter(|last| {
            count < MESSAGES_MAX && last.len().saturating_add(bytes) <= SEVERAL_BYTES_MAX
        });
        let bundle = match last {
            Some(bundle) => bundle,
            None => {
                count = 0;
                bundles.push(Vec::with_capacity(bytes));
                let at = bundles.len() - 1;
                &mut bundles[at]
            }
        };
        // What has a length beyond this is beyond what the network takes, too.
        let len = u32::try_from(message.len()).unwrap_or(u32::MAX);
        bundle.extend(len.to_be_bytes());
        bundle.extend(message);
        count += 1;
    }
    bundles
}

/// The messages of a bundle; `None` where it is not one.
pub(super) fn unpack(bundle: &[u8]) -> Option<Vec<&[u8]>> {
    let mut messages = Vec::new();
    let mut rest = bundle;
    while !rest.is_empty() {
        let (head, behind) = rest.split_first_chunk::<HEAD_BYTES>()?;
        let len = usize::try_from(u32::from_be_bytes(*head)).ok()?;
        let (message, behind) = behind.split_at_checked(len)?;
        messages.push(message);
        rest = behind;
    }
    (messages.len() <= MESSAGES_MAX).then_some(messages)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_longest_message_fits_and_takes_no_other_with_it() {
        let messages = [vec![1], vec![2; MESSAGE_BYTES_MAX], vec![3]];
        let bundles = pack(messages.clone());
        assert_eq!(bundles.len(), 3);
        assert!(bundles.iter().all(|bundle| bundle.len() <= BUNDLE_BYTES_MAX));
        let unpacked: Vec<&[u8]> = bundles.iter().flat_map(|b| unpack(b).unwrap()).collect();
        assert_eq!(unpacked, messages);
    }

    #[test]
    fn more_messages_than_a_bundle_may_have_are_refused() {
        let message = [0; HEAD_BYTES];
        assert_eq!(unpack(&message.repeat(MESSAGES_MAX)).map(|all| all.len()), Some(MESSAGES_MAX));
        assert_eq!(unpack(&message.repeat(MESSAGES_MAX + 1)), None);
    }

    proptest! {
        #[test]
        fn messages_come_back_in_order_and_none_is_added(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..300),
        ) {
            let bundles = pack(messages.clone());
            prop_assert_eq!(bundles.len(), messages.len().div_ceil(MESSAGES_MAX));
            let unpacked: Vec<&[u8]> = bundles.iter().flat_map(|b| unpack(b).unwrap()).collect();
            prop_assert_eq!(unpacked, messages);
        }

        #[test]
        fn any_bytes_are_taken_apart_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let taken = unpack(&bytes).map(|all| all.iter().map(|m| m.len() + HEAD_BYTES).sum());
            prop_assert!(taken.is_none_or(|taken: usize| taken == bytes.len()));
        }
    }
}
