//! The interpreter's own TLB: recent walks, dropped when the guest flushes, as the hardware's would be.

use super::walk::Access;
use crate::env::Privilege;
use csam::{GuestLin, GuestPhys};

const ENTRIES: usize = 512;

/// Direct-mapped by page number; reads, writes and fetches of user and supervisor are told apart, so that an entry
/// means "this access was allowed, and A and D are set".
pub struct Tlb {
    entries: Box<[(u32, u32); ENTRIES]>,
}

impl Default for Tlb {
    fn default() -> Self {
        Tlb { entries: Box::new([(0, 0); ENTRIES]) }
    }
}

fn tag(lin: GuestLin, access: Access) -> u32 {
    let kind = if access.write {
        2
    } else if access.fetch {
        3
    } else {
        1
    };
    let user = if access.privilege == Privilege::User { 4 } else { 0 };
    // Never 0: an empty entry matches nothing.
    (lin.0 & !0xfff) | kind | user
}

fn slot(tag: u32) -> usize {
    ((tag >> 12) ^ (tag << 5) ^ (tag >> 21)) as usize & (ENTRIES - 1)
}

impl Tlb {
    /// The frame an earlier walk found for this page and kind of access.
    #[must_use]
    pub fn get(&self, lin: GuestLin, access: Access) -> Option<GuestPhys> {
        let tag = tag(lin, access);
        let (have, frame) = self.entries[slot(tag)];
        (have == tag).then(|| GuestPhys(u64::from(frame) << 12))
    }

    /// Remembers a walk. Frames beyond 16 TiB do not exist and are not remembered.
    pub fn put(&mut self, lin: GuestLin, access: Access, frame: GuestPhys) {
        if let Ok(number) = u32::try_from(frame.0 >> 12) {
            let tag = tag(lin, access);
            self.entries[slot(tag)] = (tag, number);
        }
    }

    /// Forgets everything: any flush, and any change of what a walk depends on.
    pub fn clear(&mut self) {
        self.entries.fill((0, 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_access_do_not_stand_in_for_each_other() {
        let mut t = Tlb::default();
        let (lin, frame) = (GuestLin(0xc123_4567), GuestPhys(0x5000));
        t.put(lin, Access::read(Privilege::Supervisor), frame);
        assert_eq!(t.get(GuestLin(0xc123_4000), Access::read(Privilege::Supervisor)), Some(frame));
        assert_eq!(t.get(lin, Access::write(Privilege::Supervisor)), None);
        assert_eq!(t.get(lin, Access::read(Privilege::User)), None);
        assert_eq!(t.get(lin, Access::fetch(Privilege::Supervisor)), None);
        t.clear();
        assert_eq!(t.get(lin, Access::read(Privilege::Supervisor)), None);
    }

    #[test]
    fn the_page_at_zero_is_not_taken_for_an_empty_entry() {
        assert_eq!(Tlb::default().get(GuestLin(0), Access::read(Privilege::Supervisor)), None);
    }
}
